"""What comes back: deltas from the engine, and the whole outputs that callers keep.

The engine emits one `SequenceDelta` for each sequence that moved in a step. `RequestOutput` is their sum; it has vLLM's
field names. Times are `time.monotonic()` seconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from nybble.core.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]


class Logprob(msgspec.Struct, frozen=True):
    """Natural-log probability of one token under the model's unmodified distribution (as vLLM's `raw_logprobs`)."""

    logprob: float
    rank: int  # 1 is the likeliest token
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id → log-probability: the token itself first, then the likeliest ones."""


class Timing(msgspec.Struct):
    """When the stages of a request were reached; None until then."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


class SequenceDelta(msgspec.Struct, kw_only=True):
    """What one step added to one completion. The last one of a sequence carries `finish_reason`."""

    request_id: str
    index: int  # which of the n completions
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first delta that has them
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that matched; None for EOS
    error: str | None = None
    refused_parameter: str | None = None  # the request could not begin, for this field of it; `error` says why
    num_cached_tokens: int = 0
    timing: Timing | None = None  # with the first token, and with the last delta


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One completion so far."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    timing: Timing | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A prompt and its completions so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    @classmethod
    def begin(cls, request: Request) -> RequestOutput:
        """The output of a request of which nothing has come yet."""
        return cls(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput(index=index) for index in range(request.params.n)],
        )

    def add(self, delta: SequenceDelta) -> None:
        """Fold one delta in."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + delta.logprobs
            chosen = (
                logprobs[token_id].logprob for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True)
            )
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(chosen)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
            output.error = delta.error
            output.timing = delta.timing
