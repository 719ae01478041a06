"""`StructuredOutputs`: what it takes, and what it says about the rest."""

import json
from typing import Any

import msgspec
import pytest

from nybble.core.errors import RequestError
from nybble.core.sampling import SamplingParams
from nybble.core.structured import MAX_CHARS, StructuredOutputs

SCHEMA = {"type": "object", "properties": {"not": {"type": "string"}, "b": {"const": {"not": 1}}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"json": SCHEMA}, "json", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"json": json.dumps(SCHEMA)}, "json", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ("a", "")}, "choice", '["a",""]'),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"json_object": True}, "json_object", "true"),
        ({"regex": "a", "json_object": False}, "regex", "a"),
        ({"structural_tag": {"format": {}}}, "structural_tag", '{"format":{}}'),
    ],
)
def test_one_form_is_given(fields: dict[str, Any], kind: str, text: str) -> None:
    form = StructuredOutputs(**fields)
    assert (form.kind, form.text) == (kind, text)
    params = SamplingParams(structured_outputs=form)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "has none of them"),
    ({"regex": "a", "choice": ["a"]}, "has regex and choice"),
    ({"choice": []}, "at least one string"),
    ({"choice": "ab"}, "at least one string"),
    ({"choice": ["a", 5]}, "at least one string"),
    ({"regex": ""}, "non-empty string"),
    ({"regex": 5}, "non-empty string"),
    ({"regex": "\ud800"}, "surrogates"),
    ({"grammar": ["a"]}, "non-empty string"),
    ({"json": "{"}, "not valid JSON"),
    ({"structural_tag": {}}, "`format`"),
    ({"structural_tag": {"format": []}}, "`format`"),
    ({"json": "[]"}, "must be a JSON object"),
    ({"json": True}, "must be a JSON object"),
    ({"json": {"a": object()}}, "not valid JSON"),
    ({"json": '{"a":' * 100_000}, "at most"),
    ({"json": '{"a":' * 5_000}, "not valid JSON"),
    ({"json_object": 1}, "True or False"),
    ({"regex": "a", "disable_any_whitespace": "x"}, "True or False"),
    ({"regex": "a" * (MAX_CHARS + 1)}, "at most 262144"),
    ({"json": {"enum": ["x" * 10**6]}}, "at most 262144"),
    ({"json": {"multipleOf": 3}}, '"multipleOf", which is not supported'),
    ({"json": {"properties": {"a": {"items": [], "uniqueItems": True}}}}, '"uniqueItems"'),
    ({"json": {"$defs": {"a": {"anyOf": [{"not": {}}]}}}}, '"not"'),
    ({"json": {"type": "string", "format": "colour"}}, "colour"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_what_is_wrong_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match="response_format: ") as caught:
        StructuredOutputs(**fields, source="response_format")
    assert words in str(caught.value)
    assert caught.value.parameter == "response_format"
    assert len(str(caught.value)) < 500


def test_sampling_parameters_take_it_as_a_dict() -> None:
    params = SamplingParams(structured_outputs={"regex": "a", "json": None})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputs(regex="a")
    for wrong in ({"regexp": "a"}, {"regex": "a", "source": "x"}, {}, 5, "a"):
        with pytest.raises(RequestError, match="structured_outputs"):
            SamplingParams(structured_outputs=wrong)  # type: ignore[arg-type]


def test_recursive_values_are_refused() -> None:
    schema: dict[str, Any] = {}
    schema["a"] = schema
    with pytest.raises(RequestError, match="not valid JSON"):
        StructuredOutputs(json=schema)
