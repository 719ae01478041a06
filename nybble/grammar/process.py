"""`CompilingProcess`: the engine's end of `nybble.grammar.worker`: start, ask with a deadline, kill."""

from __future__ import annotations

import os
import selectors
import subprocess
import time

from nybble.grammar import messages
from nybble.grammar.vocabulary import Vocabulary

START_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20


class CompilingProcess:
    def __init__(self, command: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def begin(self, vocabulary: Vocabulary, seconds: float) -> None:
        """
        Args:
            seconds: it ends itself when a form takes longer.

        Raises:
            RuntimeError: it does not start.
        """
        if not isinstance(self.ask(messages.Begin(vocabulary, seconds), START_SECONDS), messages.Started):
            self.kill()
            raise RuntimeError("the compiling process did not start")

    def ask(self, message: messages.ToWorker, seconds: float) -> messages.FromWorker | None:
        """Its answer; None if it died or did not answer in time."""
        end = time.monotonic() + seconds
        assert self._process.stdin is not None
        try:
            rest = memoryview(messages.encode(message))
            while rest:  # taken in at once: between two answers the process does nothing but read
                rest = rest[os.write(self._process.stdin.fileno(), rest) :]
            header = self._read(messages.LENGTH_BYTES, end)
            return messages.decode_from_worker(self._read(int.from_bytes(header, "little"), end))
        except (OSError, EOFError, ValueError):  # TimeoutError is an OSError; ValueError: its pipes were closed
            return None

    def kill(self) -> None:
        """May come from another thread than `ask`, which then returns None."""
        self._process.kill()
        self._process.wait()

    def _read(self, num_bytes: int, end: float) -> bytes:
        assert self._process.stdout is not None
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(data) < num_bytes:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._process.stdout.fileno(), min(num_bytes - len(data), _CHUNK_BYTES))
                if not chunk:
                    raise EOFError
                data += chunk
        return bytes(data)
