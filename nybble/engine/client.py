"""`EngineClient`: an engine in a process of its own, for the API process to await.

Owns: that process (start, watchdog, restart), the socket to it, and the way of deltas to whoever awaits them. Does not
know: HTTP, tokenizers, how anything is computed.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import msgspec
import zmq
import zmq.asyncio

from nybble.core import errors, messages
from nybble.core.config import EngineConfig
from nybble.core.delta_stream import DeltaStream
from nybble.core.errors import EngineClosedError, EngineDeadError, NybbleError, RequestError
from nybble.core.log import logger
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.core.stats import EngineStats
from nybble.engine.outbox import Outbox

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Meant for the process that starts the engine's, even if they reach both; see `engine_process`."""


class EngineClient:
    """One engine process at a time; a dead one is replaced. All methods belong to one event loop.

    Args:
        config: settings of the engine.
        stall_seconds: without a sign of life for so long, the process counts as hung and is killed.
        max_restarts: so many deaths in a row, none of them after `steady_seconds` of service, end the client.
        command: how to start the process; the address is appended.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        stall_seconds: float = 300.0,
        max_restarts: int = 3,
        backoff_seconds: float = 1.0,
        steady_seconds: float = 60.0,
        command: Sequence[str] = (sys.executable, "-m", "nybble.engine_process"),
    ) -> None:
        self._config = config
        self._stall_seconds = stall_seconds
        self._max_restarts = max_restarts
        self._backoff_seconds = backoff_seconds
        self._steady_seconds = steady_seconds
        self._command = command
        self._streams: dict[str, DeltaStream] = {}
        self._outbox: Outbox | None = None  # while the engine serves
        self._supervisor: asyncio.Task[None] | None = None
        self._is_closing = False
        self.ready: messages.Ready | None = None
        self.stats = EngineStats()
        self.process_id: int | None = None
        self.num_deaths = 0
        self.on_step: Callable[[messages.Stepped], None] | None = None  # for metrics
        self.on_death: Callable[[], None] | None = None  # all that was open has ended without a step that says so
        self.dead: asyncio.Future[str] | None = None  # done, with the reason, when no engine will come any more

    @property
    def is_serving(self) -> bool:
        """An engine is up, and showed a sign of life lately."""
        return self._outbox is not None

    async def start(self) -> messages.Ready:
        """Start the engine; returns when it can serve.

        Raises:
            ConfigError, ModelError, MemoryBudgetError: what the user can mend; each names the remedy.
            EngineDeadError: the process died before it was ready.
        """
        loop = asyncio.get_running_loop()
        self.dead = loop.create_future()
        first_start: asyncio.Future[messages.Ready] = loop.create_future()
        self._supervisor = asyncio.create_task(self._supervise(first_start, self.dead))
        return await first_start

    async def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta]]:
        """Serve one request and yield its deltas as they come. Closing the generator aborts the request.

        A reader that is slower than the engine gets several steps' deltas at once.

        Raises:
            RequestError: it can never be served, or its id is in use.
            EngineDeadError: the engine died; the request may be sent again.
        """
        request_id = request.request_id
        if self._is_closing:
            raise EngineClosedError("the engine is being stopped")
        if self._outbox is None:
            raise EngineDeadError("no engine is serving at the moment")
        if request_id in self._streams:
            raise RequestError(f"request_id {request_id!r} is in use", parameter="request_id")
        stream = self._streams[request_id] = DeltaStream(request.params.n)
        try:
            self._outbox.submit(request)
            while stream.num_open:
                yield await stream.take()
        finally:
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]
                self._send(messages.Abort(request_id))

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def open_ids(self) -> list[str]:
        return list(self._streams)

    def abort(self, request_id: str) -> None:
        """End a request from outside: its reader gets what there is, with `finish_reason == "abort"`."""
        self._send(messages.Abort(request_id))

    def finish(self, request_id: str) -> None:
        """End a request whose reader has all that it wanted: it counts as stopped, and nothing more comes of it."""
        if self._streams.pop(request_id, None) is not None:
            self._send(messages.Abort(request_id, "stop"))

    def reset_prefix_cache(self) -> None:
        """No request that comes later finds a prefix of before."""
        self._send(messages.ResetPrefixCache())

    async def close(self, timeout: float = 10.0) -> None:
        """Stop the process; what is open gets an EngineClosedError. Wait for it to end before, if that is wanted."""
        self._is_closing = True
        self._fail_all(EngineClosedError("the engine was stopped"))
        if self._supervisor is None:
            return
        if self._outbox is not None:
            self._send(messages.Close())
        else:
            self._supervisor.cancel()  # it is building, or waiting for its next try
        done, _ = await asyncio.wait([self._supervisor], timeout=timeout)
        if not done:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    def _send(self, message: messages.ToEngine) -> None:
        if self._outbox is not None:
            self._outbox.send(message)

    async def _supervise(self, first_start: asyncio.Future[messages.Ready], dead: asyncio.Future[str]) -> None:
        failures_in_a_row = 0
        while True:
            begin = time.monotonic()
            try:
                reason = await self._serve_once(first_start)
            except NybbleError as error:  # it could not be built
                if not first_start.done():
                    first_start.set_exception(error)
                    return
                reason = str(error)
            except Exception as error:  # no descriptors, no processes, no room: the next try may find some
                logger.exception("an engine process could not be started or read")
                reason = f"{type(error).__name__}: {error}"
            if self._is_closing:
                return
            self.num_deaths += 1
            was_steady = time.monotonic() - begin > self._steady_seconds
            failures_in_a_row = 0 if was_steady else failures_in_a_row + 1
            logger.error("the engine process ended: %s", reason)
            if not first_start.done():
                first_start.set_exception(EngineDeadError(f"the engine process ended at its start: {reason}"))
                return
            if failures_in_a_row > self._max_restarts:
                dead.set_result(f"the engine process ended {failures_in_a_row} times in a row, at last: {reason}")
                return
            await asyncio.sleep(self._backoff_seconds * 2 ** max(failures_in_a_row - 1, 0))

    async def _serve_once(self, first_start: asyncio.Future[messages.Ready]) -> str:
        """Run one process from start to end. Returns why it ended."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nybble-", ignore_cleanup_errors=True))
            address = f"ipc://{folder}/engine"  # only this user can enter the folder
            socket = stack.enter_context(zmq.asyncio.Context.instance().socket(zmq.PAIR))
            for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SNDHWM, 0)):
                socket.setsockopt(option, value)
            socket.bind(address)
            with _signals_held_back():
                process = await asyncio.create_subprocess_exec(*self._command, address, stdin=asyncio.subprocess.PIPE)
            assert process.stdin is not None
            self.process_id = process.pid
            ended = asyncio.create_task(process.wait())
            try:
                process.stdin.write(msgspec.json.encode(asdict(self._config)) + b"\n")
                await process.stdin.drain()
                reason = await self._receive(socket, ended, first_start)
                if reason is None:
                    status = await ended
                    reason = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
                return reason
            except (ConnectionError, BrokenPipeError):
                return f"exit status {await ended}"
            finally:
                if self._outbox is not None:
                    self._outbox.close()
                self._outbox = self.ready = self.process_id = None
                self._fail_all(EngineDeadError("the engine process died"))
                if self.on_death is not None:
                    self.on_death()
                process.stdin.close()  # it leaves by itself on that, if it still can
                if not ended.done():
                    await asyncio.wait([ended], timeout=1.0)
                if not ended.done():
                    process.kill()
                await asyncio.wait([ended])

    async def _receive(
        self, socket: zmq.asyncio.Socket, ended: asyncio.Task[int], first_start: asyncio.Future[messages.Ready]
    ) -> str | None:
        """Take the process's messages until it ends. Returns why, if it said so or hangs."""
        while True:
            receiving = asyncio.ensure_future(socket.recv())
            # Building may take long and says nothing meanwhile; only serving is watched.
            timeout = self._stall_seconds if self._outbox is not None else None
            await asyncio.wait([receiving, ended], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                return None if ended.done() else f"no sign of life for {self._stall_seconds:g} s"
            message: messages.FromEngine = messages.decode_from_engine(receiving.result())
            if isinstance(message, messages.Stepped):
                self._take_step(message)
            elif isinstance(message, messages.Refused):
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream.fail(RequestError(message.message, parameter=message.parameter))
            elif isinstance(message, messages.Ready):
                self.ready, self._outbox = message, Outbox(socket.send)
                if not first_start.done():
                    first_start.set_result(message)
            elif isinstance(message, messages.StartFailed):
                raise _error_of(message)
            else:
                return message.message

    def _take_step(self, step: messages.Stepped) -> None:
        self.stats = step.stats
        for delta in step.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # nobody reads it any more
            stream.give(delta)
            stream.num_to_come -= delta.finish_reason is not None
            if not stream.num_to_come:
                del self._streams[delta.request_id]
        if self.on_step is not None and step.seconds:
            self.on_step(step)

    def _fail_all(self, error: NybbleError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started in here has them blocked from its beginning, until it can ignore them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _error_of(failure: messages.StartFailed) -> NybbleError:
    """The error as its own kind, so that whoever started the client tells its user what can be mended."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, NybbleError):
        return kind(failure.message)
    return EngineDeadError(f"{failure.kind}: {failure.message}")
