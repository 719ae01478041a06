"""Request fields → `SamplingParams`, within the operator's limits."""

from __future__ import annotations

from typing import Any

from nybble.core.checks import fits, shown
from nybble.core.sampling import SamplingParams
from nybble.server.errors import ApiError, bad_request
from nybble.server.forms import form_of
from nybble.server.protocol import SamplingFields
from nybble.server.settings import Limits
from nybble.text.request_builder import RequestBuilder

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


def sampling_of(
    body: SamplingFields, builder: RequestBuilder, limits: Limits, vocab_size: int, **wishes: Any
) -> SamplingParams:
    """The checkpoint's recommendations, the body's fields on top of them, and on top of all `wishes`.

    Raises:
        ApiError: more than the limits allow.
        RequestError: a value is out of its range.
    """
    if body.stream and body.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs cannot be streamed", "prompt_logprobs", "invalid_value")
    _check_length("stop", body.stop, limits.max_stops)
    _check_length("bad_words", body.bad_words, limits.max_list_items)
    _check_length("stop_token_ids", body.stop_token_ids, limits.max_list_items)
    _check_length("allowed_token_ids", body.allowed_token_ids, vocab_size)
    fields = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        fields["logit_bias"] = _biases(body.logit_bias, limits)
    fields["structured_outputs"] = form_of(body)
    params = builder.default_params(**{**fields, **wishes})
    for name, value, most in (
        ("n", params.n, limits.max_n),
        ("logprobs", params.logprobs, limits.max_logprobs),
        ("prompt_logprobs", params.prompt_logprobs, limits.max_logprobs),
        ("max_tokens", params.max_tokens, limits.max_output_tokens),
    ):
        if value is not None and most is not None and value > most:
            raise _too_many(name, f"must be at most {most}", value)
    for name, texts in (("stop", params.stop_strings), ("bad_words", params.bad_words or ())):
        longest = max(map(len, texts), default=0)
        if longest > limits.max_stop_chars:
            raise _too_many(name, f"may have at most {limits.max_stop_chars} characters in each element", longest)
    return params


def _check_length(name: str, values: object, most: int) -> None:
    if isinstance(values, list) and len(values) > most:
        raise _too_many(name, f"may have at most {most} elements", len(values))


def _too_many(name: str, rule: str, value: object) -> ApiError:
    return bad_request(f"{name} {rule} on this server, got {shown(value)}", name, "limit_exceeded")


def _biases(given: object, limits: Limits) -> dict[int, float]:
    """JSON's keys are strings."""
    if not isinstance(given, dict):
        raise bad_request(
            f"logit_bias must be an object of token ids and numbers, got {shown(given)}", "logit_bias", "invalid_value"
        )
    if len(given) > limits.max_list_items:
        raise _too_many("logit_bias", f"may have at most {limits.max_list_items} elements", len(given))
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 18) or not fits(float, value):
            raise bad_request(
                f"logit_bias must be an object of token ids and numbers, got {shown({key: value})}",
                "logit_bias",
                "invalid_value",
            )
        biases[int(key)] = value
    return biases
