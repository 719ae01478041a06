"""`RequestBuilder`: what a checkpoint recommends is checked once, and errors say where it stands."""

import re
from typing import Any

import pytest

from nybble.core.errors import ModelError
from nybble.text.request_builder import RequestBuilder


@pytest.mark.parametrize(
    ("recommended", "message"),
    [
        ({"top_p": 1.5}, "generation_config.json: top_p must be a number in (0, 1], got 1.5"),
        ({"top_k": 50.5}, "generation_config.json: top_k must be an integer"),
        ({"max_tokens": 0}, "generation_config.json: max_tokens must be an integer"),
    ],
)
def test_a_bad_recommendation_names_its_file(recommended: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        RequestBuilder(None, recommended)


def test_an_integral_top_k_is_an_integer() -> None:
    top_k = RequestBuilder(None, {"top_k": 50.0}).default_params().top_k
    assert (top_k, type(top_k)) == (50, int)
