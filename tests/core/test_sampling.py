"""SamplingParams: sound values pass, nonsense names its field and range."""

import math

import msgspec
import pytest

from nybble.core.errors import NybbleError, RequestError
from nybble.core.sampling import SamplingParams

BAD = [
    ("n", 0),
    ("n", True),
    ("n", 2.0),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("seed", 2**63),
    ("seed", 0.5),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("stop", ""),
    ("stop", ["ok", ""]),
    ("stop", [1]),
    ("stop_token_ids", [-1]),
    ("bad_words", [""]),
    ("logit_bias", {5: 101.0}),
    ("logit_bias", {-5: 1.0}),
    ("logit_bias", {5: math.nan}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-3]),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    # Integers go into int64 arrays, numbers into float32 ones.
    ("min_tokens", 2**63),
    ("max_tokens", 2**63),
    ("top_k", 2**63),
    ("stop_token_ids", [2**63]),
    ("temperature", 10**400),
    ("temperature", 1e39),
    ("repetition_penalty", 1e39),
    ("repetition_penalty", 1e-39),
    # What Python would take for something else.
    ("bad_words", "hello"),
    ("bad_words", [5]),
    ("ignore_eos", "no"),
    ("skip_special_tokens", "false"),
    ("detokenize", 1),
    ("include_stop_str_in_output", None),
    ("stop", {"a": 1}),
    ("stop", 5),
    ("stop_token_ids", 5),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [True]),
    ("logit_bias", [1]),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: True}),
    ("allowed_token_ids", {1: 2}),
    ("n", None),
    ("temperature", None),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_nonsense_names_the_field(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as raised:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert raised.value.parameter == name
    assert isinstance(raised.value, NybbleError)
    assert isinstance(raised.value, ValueError)


def test_contradictions() -> None:
    with pytest.raises(RequestError, match=r"min_tokens must not exceed max_tokens \(3\)"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(RequestError, match="min_tokens must be an integer ≥ 0"):
        SamplingParams(max_tokens=None, min_tokens=2**63)
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_edges_are_accepted() -> None:
    params = SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), max_tokens=None, logprobs=0)
    assert params.is_greedy
    assert not SamplingParams(temperature=0.5).is_greedy
    assert SamplingParams(stop="a").stop_strings == SamplingParams(stop=["a"]).stop_strings == ["a"]


def test_messages_say_what_is_accepted_and_stay_short() -> None:
    for name, value, message in (
        ("n", 0, "n must be an integer in [1, 1024], got 0"),
        ("top_p", 0.0, "top_p must be a number in (0, 1], got 0.0"),
        ("max_tokens", "5", "max_tokens must be an integer ≥ 1 and < 2**63 or None, got '5'"),
        ("stop", 5, "stop must be a string or a list of strings or None, got 5"),
        ("ignore_eos", "no", "ignore_eos must be True or False, got 'no'"),
        ("top_k", 10**5000, "top_k must be an integer ≥ -1 and < 2**63, got something of type int"),
    ):
        with pytest.raises(RequestError) as raised:
            SamplingParams(**{name: value})
        assert str(raised.value) == message
    with pytest.raises(RequestError) as raised:
        SamplingParams(stop_token_ids=[1] * 10**5 + ["x"])  # type: ignore[list-item]
    assert len(str(raised.value)) < 200


def test_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)
    assert SamplingParams(seed=-2).seed == -2


def test_what_the_caller_does_to_lists_afterwards_changes_nothing() -> None:
    ids, bias = [1], {2: 1.0}
    params = SamplingParams(stop_token_ids=ids, logit_bias=bias, stop=("a", "b"))  # type: ignore[arg-type]
    ids.append(2**70)
    bias[3] = 1e39
    assert (params.stop_token_ids, params.logit_bias, params.stop) == ([1], {2: 1.0}, ["a", "b"])


def test_survives_the_wire_and_is_checked_there() -> None:
    params = SamplingParams(temperature=0.5, stop=["a", "b"], logit_bias={3: -1.5}, seed=7)
    wire = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(wire, type=SamplingParams) == params
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 2.0}), type=SamplingParams)
