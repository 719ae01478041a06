"""Llama 3's JSON format: the whole answer is calls, or none of it is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.tool_calls.driver import Answer, cut_anywhere, json_objects, parse, parse_deltas, parse_every_way, tool

from nybble.text.tool_calls import Arguments, CallBegin, Content

TOOLS = [tool("f"), tool("g")]
TAG = "<|python_tag|>"


def parsed(text: str, **options: Any) -> Answer:
    return parse_every_way("llama3_json", text, TOOLS, **options)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello {there}.\n", "Hello {there}.\n", []),
        ('{"name": "f", "parameters": {"a": "1;{"}}', "", [("f", '{"a": "1;{"}')]),
        (f'\n\n{TAG} {{"name": "f", "parameters": {{}}}}\n', "", [("f", "{}")]),
        ('{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
        ('{"parameters": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('{"name": "f"}', "", [("f", "{}")]),
        *(
            (
                f'{{"name": "f", "parameters": {{}}}}{between}{{"name": "g", "parameters": {{}}}}',
                "",
                [("f", "{}"), ("g", "{}")],
            )
            for between in (";", " ; ", "; ", "\n", f";{TAG}", TAG, "};")
        ),
        ('{"name": "f", "parameters": {}; {"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
        ('{"name": "f", "parameters": {}} ;\n', "", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}}', "", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}\nDone.', "Done.", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}; {"x": 1}', '; {"x": 1}', [("f", "{}")]),
        ('{"name": "f", "parameters": {}}; {"name": "g", "par', '; {"name": "g", "par', [("f", "{}")]),
        # Broken later than its name and its arguments' beginning, it stays a call.
        ('{"name": "f", "parameters": {"a": b}}; x', "", [("f", '{"a": b}}; x')]),
        ('{"name": "f", "parameters": {"a": "b', "", [("f", '{"a": "b')]),
    ],
)
def test_answers(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(text) == Answer(content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        TAG,
        "<|pyth",
        f'{TAG}brave_search.call(query="x")',
        f"{TAG}{TAG}",
        "{",
        '{"name',
        "{}",
        '{"a": 1}',
        '{"name": "Alice", "parameters": {}}',
        '{"name": "f", "age": 3, "parameters": {}}',
        '{"name": "f", "parameters": [1]}',
        '{"parameters": {}}',
        '[{"name": "f", "parameters": {}}]',
        'Sure: {"name": "f", "parameters": {}}',
        '; {"name": "f", "parameters": {}}',
        '{"name": "f" "parameters": {}}\n',
    ],
)
def test_what_is_no_call_is_content_exactly(text: str) -> None:
    assert parsed(text) == Answer(text, [])


def test_without_parallel_calls_the_answer_ends_after_the_first() -> None:
    assert parsed('{"name": "f"}; {"name": "g"}', parallel=False) == Answer("", [("f", "{}")])


def test_everything_is_handed_on_as_soon_as_it_is_certain() -> None:
    pieces = ['{"na', 'me": "f", "parameters": ', '{"a": ', "1}", "}; oh", " no"]
    assert parse_deltas("llama3_json", pieces, TOOLS) == [
        [],
        [],
        [CallBegin(0, "id-0", "f"), Arguments(0, '{"a": ')],
        [Arguments(0, "1}")],
        [Content("; oh")],
        [Content(" no")],
        [],
    ]
    json_answer = ['{"name": ', '"Bob", ', '"age": 3}']  # of no tool: no need to wait for its end
    assert parse_deltas("llama3_json", json_answer, TOOLS) == [
        [],
        [Content('{"name": "Bob",')],
        [Content(' "age": 3}')],
        [],
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["f", "g"]), json_objects), min_size=1, max_size=4), st.booleans(), st.data())
def test_well_formed_answers_however_they_are_cut(
    calls: list[tuple[str, dict[str, Any]]], has_tag: bool, data: st.DataObject
) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    text = "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in written)
    text = (TAG if has_tag else "") + text
    for pieces in ([text], text, data.draw(cut_anywhere(text))):
        assert parse("llama3_json", pieces, TOOLS) == Answer("", written)
