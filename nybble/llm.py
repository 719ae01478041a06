"""`LLM`: the offline API. Prompts in, finished outputs out, in order.

Owns: the engine, and the loop that drives it in the caller's thread. Does not know: how anything is computed.
One `LLM` serves one thread at a time; `AsyncLLM` serves many callers at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from nybble.build import build
from nybble.core.config import EngineConfig
from nybble.core.errors import RequestError
from nybble.core.outputs import RequestOutput, SequenceDelta
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.core.stats import EngineStats
from nybble.progress import Progress
from nybble.text.request_builder import Conversation, Prompt, RequestBuilder


class LLM:
    """A model, ready to generate.

    Args:
        model: Hugging Face id, local directory, or `tiny` (the embedded model).
        config: fields of `EngineConfig`.

    Raises:
        ConfigError, ModelError, MemoryBudgetError: what the user can mend; each names the remedy.
    """

    def __init__(self, model: str, **config: Any) -> None:
        built = build(EngineConfig.from_settings(model=model, **config))
        self.engine = built.engine
        self.runner = built.runner  # the engine's; for tools that measure
        self.config = built.config
        self.checkpoint = built.checkpoint
        self.report = built.report
        self.tokenizer = built.tokenizer
        self.requests = RequestBuilder(built.tokenizer, built.checkpoint.default_sampling)
        self._is_running = False

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters of the engine."""
        return self.engine.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: a text or a list of token ids, or a list of these.
            sampling_params: for all prompts, or a list with one for each. None: the sampling that the checkpoint
                recommends, and at most 16 tokens.
            progress: show a progress bar on standard error. None: if that is a terminal and there are several prompts.

        Returns: one output for each prompt, in order. A completion that failed has `finish_reason == "error"`.

        Raises:
            RequestError: a prompt can never be served, or parameters do not match; nothing is returned.
            KeyboardInterrupt: Ctrl-C; what was running is aborted, and the `LLM` can go on.
        """
        prompts = [prompts] if _is_single(prompts) else _listed("prompts", prompts)  # type: ignore[list-item]
        each = _one_for_each(sampling_params, len(prompts))
        return self._finish(map(self.requests.from_prompt, prompts, each), len(prompts), progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations.

        Args:
            messages: a user's message, or a list of dicts with `role` and `content`; or a list of these.
            sampling_params: as in `generate`, but without any the answer may fill the model's context.
            template_options: those of `Tokenizer.render_chat`, for instance `tools` or `enable_thinking`.
        """
        conversations = [messages] if _is_conversation(messages) else _listed("messages", messages)
        each = _one_for_each(sampling_params, len(conversations))
        requests = (
            self.requests.from_chat(conversation, params, **template_options)  # type: ignore[arg-type]
            for conversation, params in zip(conversations, each, strict=True)
        )
        return self._finish(requests, len(conversations), progress)

    def run(self, requests: Iterable[Request], *, raise_refused: bool = True) -> Generator[list[SequenceDelta]]:
        """Serve requests and yield what each step brought: the layer under `generate`, for streaming.

        Closing the generator, or Ctrl-C, aborts what has not ended. During the run Ctrl-C waits for the step's end, so
        that the engine stays sound; a second Ctrl-C does not wait.

        Args:
            raise_refused: False ends a request that can never be served with an error delta instead of raising.
        """
        if self._is_running:
            raise RequestError("this LLM is in use: one run at a time; AsyncLLM serves many callers")
        self._is_running = True
        open_ids: set[str] = set()
        try:
            with _deferred_interrupt() as interrupted:
                refused = []
                for request in requests:
                    try:
                        self.engine.add(request)
                    except RequestError as error:
                        if raise_refused:
                            raise
                        refused += _refusals(request, error)
                    else:
                        open_ids.add(request.request_id)
                if refused:
                    yield refused
                while self.engine.has_work:
                    # An earlier run whose end was interrupted may still have something to tell: not to this one.
                    deltas = [delta for delta in self.engine.step() if delta.request_id in open_ids]
                    if raise_refused:
                        _raise_refusal(deltas)
                    if deltas:
                        yield deltas
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            try:
                self._drop(open_ids)
            finally:
                self._is_running = False

    def close(self) -> None:
        """Release the model and its memory."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, requests: Iterable[Request], num_requests: int, progress: bool | None) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}

        def recorded() -> Iterator[Request]:
            for request in requests:
                outputs[request.request_id] = RequestOutput.begin(request)
                yield request

        with Progress(num_requests, progress) as bar:
            for deltas in self.run(recorded()):
                for delta in deltas:
                    output = outputs[delta.request_id]
                    output.add(delta)
                    bar.advance(len(delta.token_ids), int(delta.finish_reason is not None and output.finished))
        return list(outputs.values())

    def _drop(self, request_ids: set[str]) -> None:
        """Abort what is still open, so that nothing of it shows up in the next run."""
        for request_id in request_ids:
            self.engine.abort(request_id)
        while request_ids and self.engine.has_work:
            self.engine.step()


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or bool(isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int))


def _listed(name: str, values: object) -> list[Any]:
    """Several of them, from any iterable that is not one of them."""
    if not isinstance(values, Iterable) or isinstance(values, Mapping | bytes):
        raise RequestError(f"{name} must be one or a list, got {type(values).__name__}", parameter=name)
    return list(values)


def _is_conversation(messages: Conversation | Sequence[Conversation]) -> bool:
    return isinstance(messages, str) or bool(
        isinstance(messages, Sequence) and messages and isinstance(messages[0], Mapping)
    )


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    params = _listed("sampling_params", params)
    if not all(each is None or isinstance(each, SamplingParams) for each in params):
        raise RequestError("sampling_params must be SamplingParams, one or a list", parameter="sampling_params")
    if len(params) != num_prompts:
        raise RequestError(
            f"sampling_params has {len(params)} entries for {num_prompts} prompts; give one, or one for each",
            parameter="sampling_params",
        )
    return params


def _raise_refusal(deltas: list[SequenceDelta]) -> None:
    for delta in deltas:
        if delta.refused_parameter is not None:
            raise RequestError(delta.error or "", parameter=delta.refused_parameter)


def _refusals(request: Request, error: RequestError) -> list[SequenceDelta]:
    """The last delta of each completion."""
    return [
        SequenceDelta(request_id=request.request_id, index=index, finish_reason="error", error=str(error))
        for index in range(request.params.n)
    ]


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one raises as usual. Only the main thread can see Ctrl-C at all."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    if not callable(before):  # ignored, or not Python's to handle
        yield interrupted
        return
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
