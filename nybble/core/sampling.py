"""What a user may ask of the sampler and of the stop conditions: `SamplingParams`.

Names and meanings are vLLM's, so that callers can move over without edits. Values are checked here, once, when the
object is made: whatever reaches the engine is valid. Limits that depend on a model (vocabulary, context length) are
checked by the engine when a request is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast, get_type_hints

import msgspec
from msgspec.structs import force_setattr

from nybble.core.checks import Interval, fits, shown, wording
from nybble.core.errors import RequestError
from nybble.core.structured import StructuredOutputs

SAMPLING_EPSILON = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow fp32 logits."""

MAX_LOGPROBS = 20

_NATURAL = Interval(0)
_RANGES = {
    "n": Interval(1, 1024),
    # Bounds that no use needs, but float32 does: a factor that overflows turns the −inf of masked tokens into NaN.
    "temperature": Interval(0, 1e4),
    "repetition_penalty": Interval(1e-3, 1e3),
    "top_p": Interval(0, 1, open_low=True),
    "top_k": Interval(-1),
    "min_p": Interval(0, 1),
    "presence_penalty": Interval(-2, 2),
    "frequency_penalty": Interval(-2, 2),
    "seed": Interval(),
    "max_tokens": Interval(1),
    "min_tokens": _NATURAL,
    "stop_token_ids": _NATURAL,
    "allowed_token_ids": _NATURAL,
    "logit_bias": Interval(-100, 100),
    "logprobs": Interval(0, MAX_LOGPROBS),
    "prompt_logprobs": Interval(0, MAX_LOGPROBS),
}


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How to continue one prompt.

    Args:
        n: completions for the prompt, in [1, 1024]; they share its KV blocks.
        temperature: 0 is greedy; the distribution is softmax(logits / temperature); in [0, 10000].
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than min_p × the likeliest one, in [0, 1].
        presence_penalty: subtracted from the logit of each token generated so far, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the generated text, in [-2, 2].
        repetition_penalty: divides positive, multiplies negative logits of tokens so far, prompt too; in [0.001, 1000].
        seed: makes a request repeatable, alone or in any batch; None or -1: unseeded.
        max_tokens: most tokens to generate, at least 1; None means up to the model's context length.
        min_tokens: end-of-sequence tokens and stop conditions are held back for this many tokens; at most max_tokens.
        stop: strings that end the text, of any length, also across token borders.
        stop_token_ids: token ids that end the text.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        bad_words: strings that must not be generated.
        logit_bias: token id → value added to its logit, each in [-100, 100].
        allowed_token_ids: if given, only these can be generated.
        logprobs: log-probabilities of the likeliest this-many tokens with each generated one, at most 20.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: accepted for compatibility; fast tokenizers decide this themselves.
        detokenize: False returns token ids only.
        structured_outputs: the form that the text must have; a dict of `StructuredOutputs`' fields, too.

    Raises:
        RequestError: a value is outside its range; names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: list[str] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        if isinstance(fields := cast(object, self.structured_outputs), Mapping):
            force_setattr(self, "structured_outputs", StructuredOutputs.of(fields))
        for name, kind in _kinds().items():
            value = getattr(self, name)
            if isinstance(value, list | tuple | dict):  # a copy: what the caller does to his own later is not checked
                value = dict(value) if isinstance(value, dict) else list(value)
                force_setattr(self, name, value)
            if not fits(kind, value, _RANGES.get(name)):
                _fail(name, value, f"must be {wording(kind, _RANGES.get(name))}")
        if self.seed == -1:  # as in vLLM
            force_setattr(self, "seed", None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _fail("min_tokens", self.min_tokens, f"must not exceed max_tokens ({self.max_tokens})")
        for name, texts in (("stop", self.stop_strings), ("bad_words", self.bad_words or [])):
            if "" in texts:
                _fail(name, getattr(self, name), "must be non-empty strings")
        if self.stop_strings and not self.detokenize:
            _fail("stop", self.stop, "needs detokenize=True: stop strings are searched in the text")
        if self.allowed_token_ids == []:
            _fail("allowed_token_ids", [], "must name at least one token; use None to allow all")
        if self.logit_bias and min(self.logit_bias) < 0:
            _fail("logit_bias", min(self.logit_bias), "must be of token ids ≥ 0")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < SAMPLING_EPSILON

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def _fail(name: str, value: object, rule: str) -> None:
    raise RequestError(f"{name} {rule}, got {shown(value)}", parameter=name)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(SamplingParams)
