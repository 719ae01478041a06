"""`AsyncLLM`: the engine behind `async` streams, for many callers at once.

Owns: one thread that builds the engine and steps it, and the way of deltas from there to whoever awaits them. Does not
know: how anything is computed, HTTP.

    caller's event loop                       engine thread
    stream() ── command queue ──────────────► engine.add / abort
             ◄─ loop.call_soon_threadsafe ─── engine.step() → deltas    (one call a step for all streams)
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Self

from nybble.build import Built, StartupReport, build
from nybble.core.config import EngineConfig, ResolvedConfig
from nybble.core.delta_stream import DeltaStream
from nybble.core.errors import EngineDeadError
from nybble.core.log import logger
from nybble.core.outputs import RequestOutput, SequenceDelta
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.core.stats import EngineStats
from nybble.engine.engine import Engine
from nybble.text.request_builder import Conversation, Prompt, RequestBuilder

Command = Callable[[Engine], None]


class AsyncLLM:
    """A model, ready to stream. Use it as `async with AsyncLLM(model) as llm`, or call `start` and `close`.

    Args:
        model: Hugging Face id, local directory, or `tiny` (the embedded model).
        config: fields of `EngineConfig`.

    Raises:
        ConfigError: a setting is nonsense. What is wrong with the model shows in `start`.
    """

    def __init__(self, model: str, **config: Any) -> None:
        self._settings = EngineConfig.from_settings(model=model, **config)
        self._commands: SimpleQueue[Command | None] = SimpleQueue()  # None: close
        self._streams: dict[str, DeltaStream] = {}  # the engine thread's; open requests
        self._built: Future[Built] = Future()
        self._built.set_running_or_notify_cancel()  # else whoever gives up waiting would cancel it for all
        self._lock = threading.Lock()  # of the next two
        self._thread: threading.Thread | None = None
        self._why_closed: str | None = None
        self._stats: EngineStats | None = None
        self._requests: RequestBuilder | None = None

    async def start(self) -> None:
        """Load the model; returns when it can serve. Further calls wait for the same start.

        Raises:
            ConfigError, ModelError, MemoryBudgetError: what the user can mend; each names the remedy.
            EngineDeadError: it was closed before.
        """
        with self._lock:
            if self._why_closed is not None:
                raise EngineDeadError(self._why_closed)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nybble-engine", daemon=True)
                self._thread.start()
        built = await asyncio.wrap_future(self._built)
        if self._requests is None:
            self._requests = RequestBuilder(built.tokenizer, built.checkpoint.default_sampling)

    @property
    def config(self) -> ResolvedConfig:
        return self._ready().config

    @property
    def report(self) -> StartupReport:
        return self._ready().report

    @property
    def requests(self) -> RequestBuilder:
        """Makes requests for this model."""
        self._ready()
        assert self._requests is not None
        return self._requests

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters after the last step."""
        self._ready()
        assert self._stats is not None
        return self._stats

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput]:
        """Continue a prompt. Yields one growing `RequestOutput` whenever it has grown; the last is finished.

        Leaving the loop, or cancelling its task, aborts the request.

        Args:
            prompt: a text or a list of token ids.
            sampling_params: None: the sampling that the checkpoint recommends, and at most 16 tokens.

        Raises:
            RequestError: the prompt can never be served.
            EngineDeadError: the engine has stopped.
        """
        await self.start()
        request = self.requests.from_prompt(
            prompt, sampling_params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer a conversation (a text alone is a user's message); the rest is as in `generate`.

        Without `sampling_params` the answer may fill the model's context.
        """
        await self.start()
        request = self.requests.from_chat(
            messages,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            **template_options,
        )
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta]]:
        """Serve one request and yield its deltas as they come: the layer under `generate`.

        A reader that is slower than the engine gets several steps' deltas at once; nothing waits for it.
        """
        await self.start()
        stream = DeltaStream(request.params.n)
        self._send(partial(self._admit, stream, request))
        try:
            while stream.num_open:
                yield await stream.take()
        finally:
            if stream.num_open:
                self._commands.put(partial(self._abandon, stream, request.request_id))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets `finish_reason == "abort"`. Ids that are not open are ignored."""
        self._send(lambda engine: engine.abort(request_id))

    def close(self) -> None:
        """Abort what is open, stop the thread, release the device. Blocks for a step at most; may be called twice."""
        with self._lock:
            self._why_closed = self._why_closed or "the engine has stopped: it was closed"
            thread = self._thread
        if thread is not None:
            self._commands.put(None)
            thread.join()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _ready(self) -> Built:
        if not self._built.done():
            raise EngineDeadError("the model is not loaded yet: `await llm.start()` first")
        return self._built.result()

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput]:
        output = RequestOutput.begin(request)
        async with aclosing(self.stream(request)) as steps:
            async for deltas in steps:
                for delta in deltas:
                    output.add(delta)
                yield output

    def _send(self, command: Command) -> None:
        # Under the lock no command can come behind the closing one, where nobody would read it.
        with self._lock:
            if self._why_closed is not None:
                raise EngineDeadError(self._why_closed)
            self._commands.put(command)

    # What follows runs in the engine thread.

    def _serve(self) -> None:
        try:
            built = build(self._settings)
        except BaseException as error:
            self._built.set_exception(error)
            return
        engine = built.engine
        self._stats = engine.stats
        self._built.set_result(built)
        try:
            while self._obey(engine):
                self._deliver(engine.step())
                self._stats = engine.stats
            self._abort_all(engine)
        except BaseException as error:
            logger.exception("the engine thread stopped")
            self._die(error)
        finally:
            engine.close()

    def _obey(self, engine: Engine) -> bool:
        """Carry out what callers asked, waiting for it if there is nothing to compute. False: close."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work)
            except Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _admit(self, stream: DeltaStream, request: Request, engine: Engine) -> None:
        try:
            engine.add(request)
        except Exception as error:  # whatever it is, it concerns this request alone
            _call(stream.loop, partial(stream.fail, error))
        else:
            self._streams[request.request_id] = stream

    def _abandon(self, stream: DeltaStream, request_id: str, engine: Engine) -> None:
        """Nobody reads this stream any more. Its id may be another's, where the engine refused it to this one."""
        if self._streams.get(request_id) is stream:
            engine.abort(request_id)

    def _deliver(self, deltas: list[SequenceDelta]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[DeltaStream, SequenceDelta]]] = defaultdict(list)
        for delta in deltas:
            stream = self._streams[delta.request_id]
            by_loop[stream.loop].append((stream, delta))
            stream.num_to_come -= delta.finish_reason is not None
            if not stream.num_to_come:
                del self._streams[delta.request_id]
        for loop, pairs in by_loop.items():
            _call(loop, partial(_give, pairs))

    def _abort_all(self, engine: Engine) -> None:
        for request_id in self._streams:
            engine.abort(request_id)
        while engine.has_work:
            self._deliver(engine.step())

    def _die(self, error: BaseException) -> None:
        """Tell everyone who waits, and everyone who is about to."""
        reason = f"the engine has stopped: {type(error).__name__}: {error}"
        dead = error if isinstance(error, EngineDeadError) else EngineDeadError(reason)
        with self._lock:
            self._why_closed = str(dead)
        for stream in self._streams.values():
            _call(stream.loop, partial(stream.fail, dead))
        self._streams.clear()
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            if isinstance(command, partial) and command.func == self._admit:
                stream = command.args[0]
                _call(stream.loop, partial(stream.fail, dead))


def _give(pairs: list[tuple[DeltaStream, SequenceDelta]]) -> None:
    for stream, delta in pairs:
        stream.give(delta)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Run `function` in a loop that may be gone, and its readers with it."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        logger.debug("a stream's event loop is closed")
