"""`GrammarCompiler`: forms in, grammars out, compiled in a process that is killed when it takes too long.

Owns: that process (started when the first form comes, replaced when it dies), the thread that talks to it, and the
grammars compiled so far, as many as fit. Whoever asks for a form that is being compiled, or was, shares what comes of
it, errors too. Does not know: requests, the model, what a grammar is used for.
"""

from __future__ import annotations

import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from msgspec.structs import replace

from nybble.core.errors import RequestError
from nybble.core.log import logger
from nybble.core.structured import StructuredOutputs
from nybble.grammar import messages
from nybble.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from nybble.grammar.matcher import Grammar

COMPILE_SECONDS = 10.0
START_SECONDS = 120.0
"""Importing takes two seconds, on a machine that has nothing else to do."""

CACHE_BYTES = 2**28
ERROR_BYTES = 2**10  # what a remembered refusal counts as
MAX_QUEUED = 1024

_WORKER = (sys.executable, "-m", "nybble.grammar.worker")


class GrammarCompiler:
    """
    Args:
        vocabulary: makes it; called once, in the compiler's thread, when the first form comes.
        compile_seconds: what takes longer is refused.
        cache_bytes: of the grammars that are kept, and of their sources.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        *,
        compile_seconds: float = COMPILE_SECONDS,
        cache_bytes: int = CACHE_BYTES,
        command: tuple[str, ...] = _WORKER,
    ) -> None:
        self._make_vocabulary = vocabulary
        self._compile_seconds = compile_seconds
        self._cache_bytes = cache_bytes
        self._command = command
        self._lock = threading.Lock()
        self._grammars: OrderedDict[StructuredKey, Future[Grammar]] = OrderedDict()  # the one used last comes last
        self._sizes: dict[StructuredKey, int] = {}  # of those that are done
        self._jobs: queue.SimpleQueue[tuple[StructuredKey, StructuredOutputs] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._worker: _Worker | None = None
        self._is_closed = False
        self.num_compiled = 0  # asked of the process
        self.num_cached_bytes = 0

    def compile(self, form: StructuredOutputs) -> Future[Grammar]:
        """The form's grammar, now or soon. The future raises RequestError where the form is unsound or too much."""
        key = _key(form)
        with self._lock:
            if (known := self._grammars.get(key)) is not None:
                self._grammars.move_to_end(key)
                return known
            future: Future[Grammar] = Future()
            if self._is_closed or len(self._grammars) - len(self._sizes) >= MAX_QUEUED:
                future.set_exception(RequestError("too many grammars wait to be compiled; try again later"))
                return future
            self._grammars[key] = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nybble-grammars", daemon=True)
                self._thread.start()
        self._jobs.put((key, replace(form, reasoning=None, source="structured_outputs")))
        return future

    def close(self) -> None:
        """Stop the process. What waits is refused."""
        with self._lock:
            self._is_closed = True
            worker, self._worker = self._worker, None
        self._jobs.put(None)
        if worker is not None:
            worker.kill()

    # What follows runs in the compiler's thread.

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            key, form = job
            with self._lock:
                future = self._grammars[key]
            num_bytes = ERROR_BYTES
            keeps = True
            try:
                grammar = self._compile(form)
            except RequestError as error:
                future.set_exception(error)
            except Exception as error:
                logger.exception("the grammar compiler failed")
                keeps = False  # of the server's fault, so the next one may have more luck
                future.set_exception(RequestError(f"the grammar compiler failed ({type(error).__name__}); try again"))
            else:
                num_bytes = grammar.num_bytes
                future.set_result(grammar)
            self._remember(key, num_bytes + len(form.text), keeps)

    def _remember(self, key: StructuredKey, num_bytes: int, keeps: bool) -> None:
        with self._lock:
            self._sizes[key] = num_bytes
            self.num_cached_bytes += num_bytes
            if not keeps:
                self._forget(key)
            for oldest in [key for key in self._grammars if key in self._sizes]:
                if self.num_cached_bytes <= self._cache_bytes:
                    break
                self._forget(oldest)

    def _forget(self, key: StructuredKey) -> None:
        del self._grammars[key]
        self.num_cached_bytes -= self._sizes.pop(key)

    def _compile(self, form: StructuredOutputs) -> Grammar:
        worker = self._running_worker()
        self.num_compiled += 1
        answer = worker.ask(messages.Compile(form), self._compile_seconds + 1)
        if answer is None:
            self._drop_worker()
            raise RequestError(
                f"its grammar took more than {self._compile_seconds:g} s or too much memory to compile; make it simpler"
            )
        if isinstance(answer, messages.Rejected):
            raise RequestError(f"{form.kind} cannot be used: {answer.reason}")
        assert isinstance(answer, messages.Compiled)
        return self._load(answer.grammar)

    def _running_worker(self) -> _Worker:
        if self._worker is not None and self._worker.is_alive:
            return self._worker
        self._drop_worker()
        if not hasattr(self, "_vocabulary"):
            self._vocabulary = self._make_vocabulary()
        worker = _Worker(self._command)
        with self._lock:
            if self._is_closed:
                worker.kill()
                raise RequestError("the engine was closed")
            self._worker = worker
        begin = messages.Begin(self._vocabulary, self._compile_seconds)
        if not isinstance(worker.ask(begin, START_SECONDS), messages.Started):
            self._drop_worker()
            raise RuntimeError("the compiling process did not start")
        return worker

    def _drop_worker(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()

    def _load(self, text: bytes) -> Grammar:
        import xgrammar

        from nybble.grammar.matcher import Grammar

        if not hasattr(self, "_info"):
            self._info = self._vocabulary.info()
        compiled = xgrammar.CompiledGrammar.deserialize_json(text.decode(), self._info)
        return Grammar(compiled, self._vocabulary.pieces, self._vocabulary.end_token_ids)


StructuredKey = tuple[str, str, bool]


def _key(form: StructuredOutputs) -> StructuredKey:
    return form.kind, form.text, form.disable_any_whitespace


class _Worker:
    """One compiling process."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: messages.ToWorker, seconds: float) -> messages.FromWorker | None:
        """Its answer; None if it died or did not come in time."""
        end = time.monotonic() + seconds
        try:
            rest = memoryview(messages.encode(message))
            while rest:  # the process reads whatever else it does: between two answers it does nothing else
                rest = rest[os.write(self._stdin.fileno(), rest) :]
            header = self._read(messages.LENGTH_BYTES, end)
            return messages.decode_from_worker(self._read(int.from_bytes(header, "little"), end))
        except (OSError, EOFError, ValueError):
            return None

    def _read(self, count: int, end: float) -> bytes:
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while len(data) < count:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._stdout.fileno(), min(count - len(data), 1 << 20))
                if not chunk:
                    raise EOFError
                data += chunk
        return bytes(data)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
