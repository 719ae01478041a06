"""Hermes' format: calls amid text, streamed JSON arguments, and everything that only looks like a call."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.tool_calls.driver import Answer, cut_anywhere, json_objects, parse, parse_deltas, parse_every_way

from nybble.text.tool_calls import Arguments, CallBegin, Content


def parsed(text: str, **options: Any) -> Answer:
    return parse_every_way("hermes", text, **options)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        ("  Just text.\n\n", "  Just text.\n\n", []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
        ('Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n', "Let me see.", [("f", "{}")]),
        (
            '\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{}}</tool_call>',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (
            'one \n<tool_call>{"name":"f","arguments":{}}</tool_call>\n two\n',
            "one \n\n two\n",
            [("f", "{}")],
        ),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>\n two', "two", [("f", "{}")]),
        # The arguments are the model's own text, whatever is in their strings.
        (
            '<tool_call>{"name": "f", "arguments": {"a" : [{"b":"}</tool_call>"}, "\\"{\\u00e9é🙂"]}}</tool_call>',
            "",
            [("f", '{"a" : [{"b":"}</tool_call>"}, "\\"{\\u00e9é🙂"]}')],
        ),
        # Other members, other orders, other names of the members.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"id": [1, {"name": 2}], "parameters": {}, "name": "f", "x": {}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}, "arguments": {"b": 2}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "\\u0066\\n", "arguments": null}</tool_call>', "", [("f\n", "{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        # Line breaks in strings are escaped.
        ('<tool_call>{"name": "f", "arguments": {"a": "1\n\t2"}}</tool_call>', "", [("f", '{"a": "1\\n\\t2"}')]),
        # Brackets too many or too few after the arguments, and no end tag.
        ('<tool_call>{"name": "f", "arguments": {}}}}</tool_call> x', "x", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}</tool_call> x', "x", [("f", "{}")]),
        (
            '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        ('a <tool_call>{"name": "f", "arguments": {}}\nb', "a \nb", [("f", "{}")]),
    ],
)
def test_answers(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(text) == Answer(content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<",
        "a < b <tool",
        "<tool_call>",
        " <tool_call> ",
        "The tag <tool_call> begins a call, </tool_call> ends it.",
        "<tool_call></tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": f, "arguments": {}}</tool_call>',
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", }</tool_call>\n',
        '<tool_call>{"arguments": {"a": 01}, "name": "f"}</tool_call>',
        '<tool_call>{"arguments": {"a": "\\x"}, "name": "f"}</tool_call>',
        '<tool_call>{"arguments": {"a": "1\n2"}, "na',
        '<tool_call>{"name": "f", "argum',
        '<tool_call>{"name": "f", "arguments": ',
        '<tool_call>{"name": "f"</tool_call>',
    ],
)
def test_what_is_no_call_is_content_exactly(text: str) -> None:
    assert parsed(text) == Answer(text, [])


def test_a_call_may_follow_what_is_none() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parsed(f"<tool_call>{call}") == Answer("<tool_call>", [("f", "{}")])
    assert parsed(f'<tool_call>{{"name": oh <{call}') == Answer('<tool_call>{"name": oh <', [("f", "{}")])


def test_arguments_that_stop_being_json_are_what_the_model_wrote() -> None:
    begin = '<tool_call>{"name": "f", "arguments": '
    assert parsed(begin + '{"a": 1,}}\n</tool_call> x') == Answer("x", [("f", '{"a": 1,}}\n')])
    assert parsed(begin + "{a: 1}}</tool</tool_call>") == Answer("", [("f", "{a: 1}}</tool")])
    assert parsed(begin + "{,</tool_cal") == Answer("", [("f", "{,</tool_cal")])
    assert parsed(begin + '{"a": ]') == Answer("", [("f", '{"a": ]')])


@pytest.mark.parametrize("rest", ["{", '{"a', '{"a": "b</tool_call>', '{"a": tru', '{"a": [1, 2'])
def test_a_call_cut_off_in_its_arguments_leaves_them_open(rest: str) -> None:
    answer = parsed('<tool_call>{"name": "f", "arguments": ' + rest)
    assert answer == Answer("", [("f", rest)])


def test_without_parallel_calls_the_answer_ends_after_the_first() -> None:
    text = 'a<tool_call>{"name": "f", "arguments": {}}</tool_call> b <tool_call>{"name": "g"}</tool_call>'
    assert parsed(text, parallel=False) == Answer("a", [("f", "{}")])
    broken = 'a<tool_call>{"name": "f", "arguments": {,</tool_call> b <tool_call>{"name": "g"}</tool_call>'
    assert parsed(broken, parallel=False) == Answer("a", [("f", "{,")])


def test_everything_is_handed_on_as_soon_as_it_is_certain() -> None:
    pieces = [
        "Hi",
        " there",
        "\n",
        "<tool",
        "_call>",
        '{"name": "f',
        '", "arguments":',
        ' {"a',
        '": 1',
        "2}",
        "}\n</tool_call>",
    ]
    assert parse_deltas("hermes", pieces, []) == [
        [Content("Hi")],
        [Content(" there")],
        [],
        [],
        [],
        [],
        [],
        [CallBegin(0, "id-0", "f"), Arguments(0, '{"a')],
        [Arguments(0, '": 1')],
        [Arguments(0, "2}")],
        [],
        [],
    ]


texts = st.text('ab.é<{}" \n', max_size=8).filter(lambda text: not text.endswith("<"))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, Answer]:
    """A well-formed answer, and what it says by the rule that whitespace beside calls is layout."""
    text, contents, calls = "", [draw(texts)], []
    text += contents[0]
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5))
        arguments = draw(json_objects)
        ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))
        written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
        members = [f'"name": {json.dumps(name, ensure_ascii=ascii_only)}', f'"arguments":{written}']
        if draw(st.booleans()):
            members.insert(draw(st.integers(0, 2)), f'"more": {json.dumps(draw(json_objects))}')
        if draw(st.booleans()):
            members.reverse()
        space = draw(st.sampled_from(["", "\n", " \n"]))
        contents.append(draw(texts))
        text += f"<tool_call>{space}{{{', '.join(members)}{space}}}{space}</tool_call>{contents[-1]}"
        calls.append((name, written))
    before_text = next((i for i, content in enumerate(contents) if content.strip()), len(contents))
    after_text = next((i for i, content in enumerate(contents[::-1]) if content.strip()), len(contents))
    content = "".join(contents)
    if calls and before_text:
        content = content.lstrip(" \n")
    if calls and after_text:
        content = content.rstrip(" \n")
    return text, Answer(content, calls)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(answers(), st.data())
def test_well_formed_answers_however_they_are_cut(case: tuple[str, Answer], data: st.DataObject) -> None:
    text, expected = case
    assert parse("hermes", [text]) == expected
    assert parse("hermes", text) == expected
    assert parse("hermes", data.draw(cut_anywhere(text))) == expected


@settings(max_examples=100, deadline=None)
@given(answers(), st.data())
def test_a_cut_off_answer_says_a_beginning_of_the_whole(case: tuple[str, Answer], data: st.DataObject) -> None:
    text, whole = case
    part = parse("hermes", [text[: data.draw(st.integers(0, len(text)))]])
    assert len(part.calls) <= len(whole.calls)
    for (name, arguments), (whole_name, whole_arguments) in zip(part.calls, whole.calls, strict=False):
        assert name == whole_name
        assert whole_arguments.startswith(arguments)
