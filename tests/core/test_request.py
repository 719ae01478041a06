"""Request: what is of a wrong type is refused where the request is made, not in the engine that serves everyone."""

from typing import Any

import pytest

from nybble.core.errors import RequestError
from nybble.core.request import Request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ["x"]),
        ("request_id", None),
        ("prompt_token_ids", "abc"),
        ("prompt_token_ids", (1, 2)),
        ("prompt_token_ids", None),
        ("params", None),
        ("params", {"temperature": 0}),
        ("prompt", 5),
        ("priority", "high"),
        ("priority", 1.5),
        ("priority", True),
        ("priority", 2**63),
        ("cache_salt", 5),
        ("cache_salt", None),
        ("arrival_time", "now"),
    ],
)
def test_wrong_types_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{field} must be ") as raised:
        Request(**{"request_id": "r", "prompt_token_ids": [1], field: value})
    assert raised.value.parameter == field


def test_edges_are_accepted() -> None:
    request = Request(request_id="", prompt_token_ids=[], priority=-(2**63), cache_salt="tenant", arrival_time=0)
    assert request.priority == -(2**63)
