"""Plain text becomes JSON of the type that the schema asks for, or a string."""

from typing import Any

import pytest

from nybble.text.tool_calls.schema_types import ANY, STRING, parameter_types, to_json

DEFS = {"Colour": {"enum": ["red", 1]}, "Loop": {"$ref": "#/$defs/Loop"}, "a/b~": {"type": "boolean"}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"type": ["string", 5]}, {"string"}),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, {"number", "null"}),
        ({"oneOf": [{"type": "number"}, {}]}, set()),
        ({"allOf": [{"$ref": "#/$defs/Colour"}], "default": 1}, {"string", "number"}),
        ({"const": True}, {"boolean"}),
        ({"enum": [None, 1.5, [], {}]}, {"null", "number", "array", "object"}),
        ({"$ref": "#/$defs/a~1b~0"}, {"boolean"}),
        ({"$ref": "#/$defs/Loop"}, set()),
        ({"$ref": "#/$defs/nothing"}, set()),
        ({"$ref": "http://elsewhere/x"}, set()),
        ({"anyOf": [{"$ref": "#/$defs/Loop"}] * 50}, set()),
        ({}, set()),
        (True, set()),
        ({"type": 5}, set()),
        ({"anyOf": []}, set()),
    ],
)
def test_types_of_a_parameter(schema: Any, types: set[str]) -> None:
    assert parameter_types({"properties": {"p": schema}, "$defs": DEFS}, "p") == types


@pytest.mark.parametrize("schema", [{}, {"properties": None}, {"properties": []}, {"properties": {"q": {}}}])
def test_a_parameter_that_nobody_declared_is_a_string(schema: dict[str, Any]) -> None:
    assert parameter_types(schema, "p") == STRING


def test_schemas_that_branch_into_themselves_end() -> None:
    schema: dict[str, Any] = {
        "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"} for _ in range(30)] + [{"type": "null"}]}}
    }
    schema["properties"] = {"p": {"$ref": "#/$defs/A"}}
    assert parameter_types(schema, "p") == {"null"}


@pytest.mark.parametrize(
    ("text", "types", "json_text"),
    [
        ("5", STRING, '"5"'),
        ("5", {"integer"}, "5"),
        (" 5\n", {"integer"}, "5"),
        ("5.0", {"integer"}, "5.0"),
        ("five", {"integer"}, '"five"'),
        ("05", {"integer"}, '"05"'),
        ("-1.5e3", {"number"}, "-1.5e3"),
        ("NaN", {"number"}, '"NaN"'),
        ("true", {"boolean"}, "true"),
        ("False", {"boolean"}, "false"),
        ("yes", {"boolean"}, '"yes"'),
        ("null", {"string", "null"}, "null"),
        ("None", {"string", "null"}, "null"),
        ("5", {"string", "null"}, '"5"'),
        ('"a"', {"string", "null"}, '"\\"a\\""'),
        ("5", {"string", "integer"}, "5"),
        ("null", {"integer"}, '"null"'),
        ('{"a": [1]}', {"object"}, '{"a": [1]}'),
        ("[1, 2]", {"object"}, '"[1, 2]"'),
        ("{'a': 1}", {"object"}, "\"{'a': 1}\""),
        ('["a\nb"]', {"array"}, '["a\\nb"]'),
        ('"a"', ANY, '"a"'),
        ("a é", ANY, '"a é"'),
        ("True", ANY, "true"),
        ("", ANY, '""'),
    ],
)
def test_values(text: str, types: set[str], json_text: str) -> None:
    assert to_json(text, frozenset(types)) == json_text
