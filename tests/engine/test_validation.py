"""RequestLimits: what can never be served is refused at once, with the numbers and the remedy."""

import pytest
from support.engine_harness import request

from nybble.core.errors import RequestError
from nybble.engine.validation import RequestLimits

LIMITS = RequestLimits(vocab_size=100, max_model_len=64, num_blocks=10, block_size=4)


@pytest.mark.parametrize(
    ("prompt", "params", "parameter", "message"),
    [
        ([], {}, "prompt_token_ids", "at least one"),
        ([1, 100], {}, "prompt_token_ids", r"holds 100; .* integers in \[0, 99\]"),
        ([1, -1], {}, "prompt_token_ids", "holds -1"),
        ([1, True], {}, "prompt_token_ids", "holds True"),
        ([1, "a"], {}, "prompt_token_ids", "holds 'a'"),
        ([1], {"stop_token_ids": [100]}, "stop_token_ids", "holds 100"),
        ([1], {"allowed_token_ids": [5, 200]}, "allowed_token_ids", "holds 200"),
        ([1], {"logit_bias": {500: 1.0}}, "logit_bias", "holds 500"),
        ([1] * 64, {}, "prompt_token_ids", "64 tokens; with max_model_len = 64 it can have at most 63"),
        (
            [1] * 42,
            {"max_tokens": 1},
            "prompt_token_ids",
            r"42 tokens of KV cache .* holds 40 \(10 blocks of 4\); shorten",
        ),
        ([1] * 10, {"max_tokens": 32}, "max_tokens", r"41 tokens of KV cache \(10 of .* max_tokens ≤ 31, or give"),
        ([1] * 10, {"max_tokens": None}, "max_tokens", "63 tokens of KV cache"),
    ],
)
def test_refused(prompt: list[int], params: dict[str, object], parameter: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        LIMITS.check(request("r", prompt, **params))
    assert raised.value.parameter == parameter


def test_the_largest_that_fit() -> None:
    """40 tokens of KV hold a prompt of 10 and 30 generated ones; a 31st is sampled but never stored."""
    assert LIMITS.check(request("r", [1] * 10, max_tokens=31)) == 41
    assert LIMITS.check(request("r", [1] * 40, max_tokens=1)) == 41


def test_max_tokens_ends_at_the_context_length() -> None:
    limits = RequestLimits(vocab_size=100, max_model_len=64, num_blocks=100, block_size=4)
    for max_tokens in (None, 1000, 54):
        assert limits.check(request("r", [1] * 10, max_tokens=max_tokens)) == 64
