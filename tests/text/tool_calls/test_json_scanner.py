"""JsonScanner accepts what Python's json module does, except NaN; and passes the text through."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text.tool_calls.driver import cut_anywhere, json_values

from nybble.text.tool_calls.json_scanner import JsonScanner, read_whole

KINDS = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    type(None): "null",
    int: "number",
    float: "number",
}


def refuse(constant: str) -> None:
    raise ValueError(constant)


def reference(text: str) -> tuple[bool, object]:
    try:
        return True, json.loads(text, strict=False, parse_constant=refuse)
    except ValueError:
        return False, None


def check(text: str) -> None:
    valid, value = reference(text)
    found = read_whole(text)
    assert (found is not None) == valid, text
    if found is not None:
        kind, written = found
        assert kind == KINDS[type(value)]
        assert json.loads(written) == value  # strict: control characters are escaped


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.sampled_from([*'{}[]",: \n\\u0e+-.1', "true", "null", '"a"', '"a":', "1e5", "é", "\x01", "NaN"])).map(
        "".join
    )
)
@example("٣")  # a digit, but not JSON's
@example('"\\u٠٠٠٠"')
@example("[1٣]")
@example("\xa0" + "1")
def test_random_texts(text: str) -> None:
    check(text)


@settings(max_examples=300, deadline=None)
@given(json_values, st.booleans(), st.data())
def test_values_and_values_with_one_change(value: object, ascii_only: bool, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert read_whole(text) == (KINDS[type(value)], text)
    place = data.draw(st.integers(0, len(text)))
    check(text[:place] + data.draw(st.sampled_from([*'{}[]",:\\ 1e-', ""])) + text[place + 1 :])


@settings(max_examples=300, deadline=None)
@given(json_values, st.text("]},; x", max_size=3), st.data())
def test_a_value_ends_where_it_ends(value: object, rest: str, data: st.DataObject) -> None:
    text = json.dumps(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        rest = "," + rest  # numbers end at what follows
    scanner, out, read = JsonScanner(), list[str](), 0
    for piece in data.draw(cut_anywhere(text + rest)):
        if not scanner.done:
            read += scanner.read(piece, 0, out)
    if not scanner.done:
        scanner.finish()
    assert not scanner.failed or (rest[:1] == "x" and text[-1].isalpha())
    if not scanner.failed:
        assert (read, "".join(out)) == (len(text), text)


def test_depth_is_no_danger() -> None:
    deep = "[" * 200_000
    assert read_whole(deep) is None
    assert read_whole(deep + "]" * 200_000) == ("array", deep + "]" * 200_000)


@pytest.mark.parametrize(
    "text", ["", " ", "1 2", "tru", "truefalse", "--1", "01", "1.", ".5", '"\\x"', "{1:2}", "[1,]", '{"a":1,}']
)
def test_no_json(text: str) -> None:
    assert read_whole(text) is None
