"""`GrammarCompiler`: forms in, grammars out, compiled in processes that are killed when they take too long.

Owns: two lanes, and the grammars compiled so far, as many as fit. Whoever asks for a form that is being compiled, or
was, shares what comes of it, errors too. Does not know: requests, the model, what a grammar is used for.

A lane is a thread with a process of its own, started when it is first needed. All forms begin in the quick lane; one
that is not done there in a second moves to the patient one. So a stranger's endless forms keep only each other waiting.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from msgspec.structs import replace

from nybble.core.errors import RequestError
from nybble.core.log import logger
from nybble.core.structured import StructuredOutputs
from nybble.grammar import messages
from nybble.grammar.process import CompilingProcess
from nybble.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    import xgrammar

    from nybble.grammar.matcher import Grammar

QUICK_SECONDS = 1.0
COMPILE_SECONDS = 10.0
CACHE_BYTES = 2**28
REFUSAL_BYTES = 2**10  # what a remembered refusal counts as, without its form
MAX_WAITING = 256

COMMAND = (sys.executable, "-m", "nybble.grammar.worker")

Key = tuple[str, str, bool]


class GrammarCompiler:
    """
    Args:
        vocabulary: makes it; called once, in the quick lane's thread, when the first form comes.
        lane_seconds: how long a form may take in each lane.
        cache_bytes: of the grammars that are kept, with their forms.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        *,
        lane_seconds: tuple[float, ...] = (QUICK_SECONDS, COMPILE_SECONDS),
        cache_bytes: int = CACHE_BYTES,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        self._make_vocabulary = vocabulary
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._grammars: OrderedDict[Key, Future[Grammar]] = OrderedDict()  # the one used last comes last
        self._sizes: dict[Key, int] = {}  # of those that are done
        self._lanes = [_Lane(self, seconds, command) for seconds in lane_seconds]
        self._is_closed = False
        self.num_compiled = 0  # forms that a process was given
        self.num_cached_bytes = 0

    def compile(self, form: StructuredOutputs) -> Future[Grammar]:
        """The form's grammar, now or soon. The future raises RequestError where the form is unsound or too much."""
        key = form.kind, form.text, form.disable_any_whitespace
        with self._lock:
            if (known := self._grammars.get(key)) is not None:
                self._grammars.move_to_end(key)
                return known
            future: Future[Grammar] = Future()
            if self._is_closed or len(self._grammars) - len(self._sizes) >= MAX_WAITING:
                future.set_exception(RequestError("too many grammars wait to be compiled; try again later"))
                return future
            self._grammars[key] = future
        self._lanes[0].put(key, replace(form, reasoning=None, source="structured_outputs"))
        return future

    def close(self) -> None:
        """Stop the processes. What waits is refused."""
        with self._lock:
            self._is_closed = True
        for lane in self._lanes:
            lane.close()
        with self._lock:
            waiting = [future for key, future in self._grammars.items() if key not in self._sizes]
        for future in waiting:
            with suppress(InvalidStateError):
                future.set_exception(RequestError("the engine was closed"))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return self._make_vocabulary()

    @cached_property
    def info(self) -> xgrammar.TokenizerInfo:
        return self.vocabulary.info()

    # What follows runs in a lane's thread.

    def pass_on(self, lane: _Lane, key: Key, form: StructuredOutputs) -> None:
        """A lane had too little time for a form."""
        following = self._lanes[self._lanes.index(lane) + 1 :]
        if following:
            following[0].put(key, form)
            return
        what = f"its grammar took more than {lane.seconds:g} s or too much memory to compile; make it simpler"
        self.finish(key, RequestError(what), REFUSAL_BYTES)

    def finish(self, key: Key, outcome: Grammar | RequestError, num_bytes: int, *, keeps: bool = True) -> None:
        with self._lock:
            future = self._grammars[key]
            self._sizes[key] = num_bytes + len(key[1])
            self.num_cached_bytes += self._sizes[key]
            if not keeps:
                self._forget(key)
            for oldest in [known for known in self._grammars if known in self._sizes]:
                if self.num_cached_bytes <= self._cache_bytes:
                    break
                self._forget(oldest)
        with suppress(InvalidStateError):  # it was closed meanwhile
            if isinstance(outcome, RequestError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _forget(self, key: Key) -> None:
        del self._grammars[key]
        self.num_cached_bytes -= self._sizes.pop(key)


class _Lane:
    """Compiles one form after another, each within `seconds`."""

    def __init__(self, compiler: GrammarCompiler, seconds: float, command: tuple[str, ...]) -> None:
        self.seconds = seconds
        self._compiler = compiler
        self._command = command
        self._jobs: queue.SimpleQueue[tuple[Key, StructuredOutputs] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process: CompilingProcess | None = None
        self._is_closed = False

    def put(self, key: Key, form: StructuredOutputs) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="nybble-grammars", daemon=True)
                self._thread.start()
        self._jobs.put((key, form))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            process = self._process
        self._jobs.put(None)
        if process is not None:
            process.kill()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_closed:
            key, form = job
            try:
                self._compile(key, form)
            except Exception as error:
                # The server's fault, not the form's: whoever comes next may have more luck.
                logger.exception("a grammar could not be compiled")
                failure = RequestError(f"its grammar could not be compiled ({type(error).__name__}); try again")
                self._compiler.finish(key, failure, 0, keeps=False)

    def _compile(self, key: Key, form: StructuredOutputs) -> None:
        process = self._running_process()
        self._compiler.num_compiled += 1
        answer = process.ask(messages.Compile(form), self.seconds + 1)
        if answer is None:
            process.kill()
            self._compiler.pass_on(self, key, form)
        elif isinstance(answer, messages.Rejected):
            self._compiler.finish(key, RequestError(f"{form.kind} cannot be used: {answer.reason}"), REFUSAL_BYTES)
        else:
            assert isinstance(answer, messages.Compiled)
            grammar = self._load(answer.grammar)
            self._compiler.finish(key, grammar, grammar.num_bytes)

    def _load(self, text: bytes) -> Grammar:
        import xgrammar

        from nybble.grammar.matcher import Grammar

        compiled = xgrammar.CompiledGrammar.deserialize_json(text.decode(), self._compiler.info)
        vocabulary = self._compiler.vocabulary
        return Grammar(compiled, vocabulary.pieces, vocabulary.end_token_ids)

    def _running_process(self) -> CompilingProcess:
        if self._process is not None and self._process.is_alive:
            return self._process
        if self._process is not None:
            self._process.kill()  # it is dead, but its pipes are open
        process = CompilingProcess(self._command)
        with self._lock:
            self._process = process
            if self._is_closed:
                process.kill()
        process.begin(self._compiler.vocabulary, self.seconds)
        return process
