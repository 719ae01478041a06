"""What a user may ask of the sampler and of the stop conditions: `SamplingParams`.

Names and meanings are vLLM's, so that callers can move over without edits. Values are checked here, once, when the
object is made: whatever reaches the engine is valid. Limits that depend on a model (vocabulary, context length) are
checked by the engine when a request is added.
"""

from __future__ import annotations

import math

import msgspec

from nybble.core.errors import RequestError

SAMPLING_EPSILON = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow fp32 logits."""

MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How to continue one prompt.

    Args:
        n: completions for the prompt; they share its KV blocks.
        temperature: 0 is greedy; the distribution is softmax(logits / temperature).
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than min_p × the likeliest one, in [0, 1].
        presence_penalty: subtracted from the logit of each token generated so far, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the generated text, in [-2, 2].
        repetition_penalty: divides positive (multiplies negative) logits of tokens in prompt or output, > 0.
        seed: makes a request repeatable, alone or in any batch.
        max_tokens: most tokens to generate; None means up to the model's context length.
        min_tokens: end-of-sequence tokens and stop conditions are held back until this many were generated.
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

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            _check_number(name, getattr(self, name), low, high)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_int("n", self.n, 1, 1024)
        _check_int("top_k", self.top_k, -1, None)
        _check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
            if self.min_tokens > self.max_tokens:
                _fail("min_tokens", self.min_tokens, f"must not exceed max_tokens ({self.max_tokens})")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                _fail("stop", text, "must be non-empty strings")
        if self.stop_strings and not self.detokenize:
            _fail("stop", self.stop, "needs detokenize=True: stop strings are searched in the text")
        for word in self.bad_words or ():
            if not isinstance(word, str) or not word:
                _fail("bad_words", word, "must be non-empty strings")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _check_int(name, token_id, 0, None)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _fail("allowed_token_ids", [], "must name at least one token; use None to allow all")
        for token_id, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token_id, 0, None)
            _check_number("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < SAMPLING_EPSILON

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def _fail(name: str, value: object, rule: str) -> None:
    raise RequestError(f"{name} {rule}, got {value!r}", parameter=name)


def _check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    rule = f"must be a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        _fail(name, value, rule)


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    rule = f"must be an integer ≥ {low}" if high is None else f"must be an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        _fail(name, value, rule)
