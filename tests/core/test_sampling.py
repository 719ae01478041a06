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
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_edges_are_accepted() -> None:
    params = SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), max_tokens=None, logprobs=0)
    assert params.is_greedy
    assert not SamplingParams(temperature=0.5).is_greedy
    assert SamplingParams(stop="a").stop_strings == SamplingParams(stop=["a"]).stop_strings == ["a"]


def test_survives_the_wire_and_is_checked_there() -> None:
    params = SamplingParams(temperature=0.5, stop=["a", "b"], logit_bias={3: -1.5}, seed=7)
    wire = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(wire, type=SamplingParams) == params
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 2.0}), type=SamplingParams)
