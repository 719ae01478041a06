"""Qwen3-Coder's format: plain text between tags becomes JSON arguments of the schema's types."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.tool_calls.driver import (
    Answer,
    cut_anywhere,
    json_values,
    parse,
    parse_deltas,
    parse_every_way,
    tool,
    tricky_text,
)

from nybble.text.tool_calls import Arguments, CallBegin, Content

TOOLS = [
    tool("f", {"s": {"type": "string"}, "t": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"}}),
    tool("g"),
]


def parsed(text: str, **options: Any) -> Answer:
    return parse_every_way("qwen3_coder", text, TOOLS, **options)


def call(name: str, *parameters: tuple[str, str]) -> str:
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (" Just <b>text</b>.\n", " Just <b>text</b>.\n", []),
        (call("g"), "", [("g", "{}")]),
        (call("unknown", ("k", "1")), "", [("unknown", '{"k": "1"}')]),
        (
            "Well,\n\n" + call("f", ("s", 'é\n"x"\\'), ("n", "5")) + "\n",
            "Well,",
            [("f", '{"s": "é\\n\\"x\\"\\\\", "n": 5}')],
        ),
        (f"{call('f')}\n{call('g')}\nDone", "Done", [("f", "{}"), ("g", "{}")]),
        ("<tool_call><function=f><parameter=s>x</parameter></function></tool_call>", "", [("f", '{"s": "x"}')]),
        (call("f", ("s", ""), ("n", "")), "", [("f", '{"s": "", "n": ""}')]),
        (call("f", ("s", "\n\nx\n")), "", [("f", '{"s": "\\n\\nx\\n"}')]),
        (call("f", ("o", '{"a": "</parameter"}'), ("n", "no")), "", [("f", '{"o": {"a": "</parameter"}, "n": "no"}')]),
        # Text about tags is text.
        (
            call("f", ("s", "<function=demo>\n</function>\n</tool_call>\n<parameter=other>")),
            "",
            [("f", '{"s": "<function=demo>\\n</function>\\n</tool_call>\\n<parameter=other>"}')],
        ),
        (call("f", ("s", "see <parameter=t>")), "", [("f", '{"s": "see <parameter=t>"}')]),
        (call("f", ("s", "<parameter=s>")), "", [("f", '{"s": "<parameter=s>"}')]),
        (call("f", ("s", "<parameter=<")), "", [("f", '{"s": "<parameter=<"}')]),
        # Forgotten tags.
        ("<function=g></function>", "", [("g", "{}")]),
        ("a\n<function=g>\n</function>\n</tool_call>\nb", "a\n\nb", [("g", "{}")]),
        ("<tool_call><function=g></tool_call>", "", [("g", "{}")]),
        ("<tool_call><function=g></function>b", "b", [("g", "{}")]),
        ("<tool_call><function=g></function><function=f></function></tool_call>", "", [("g", "{}"), ("f", "{}")]),
        (
            "<tool_call><function=f>\n<parameter=s>\nx\n<parameter=n>\n3\n</parameter></function></tool_call>",
            "",
            [("f", '{"s": "x", "n": 3}')],
        ),
        ("<tool_call><function=f><parameter=s><parameter=n>3</parameter></function>", "", [("f", '{"s": "", "n": 3}')]),
        # Text where none belongs: the arguments stay open, and nothing is lost.
        ("<tool_call><function=g>\nx</function>", "x</function>", [("g", "{")]),
        ("<tool_call><function=g><parameter=a\n>x", "<parameter=a\n>x", [("g", "{")]),
        ("t<tool_call><function=g>\n<parameter=a\n>x", "t\n<parameter=a\n>x", [("g", "{")]),
        ("<tool_call><function=g>x <tool_call>\n<function", "x <tool_call>\n<function", [("g", "{")]),
        ("<tool_call><function=g>" + call("f"), "", [("g", "{"), ("f", "{}")]),
        # The answer is cut off: so are the arguments.
        ("<tool_call><function=g>", "", [("g", "{")]),
        ("<tool_call><function=g><parameter=a", "", [("g", "{")]),
        ("<tool_call><function=f><parameter=s>\nx\n</para", "", [("f", '{"s": "x')]),
        ("<tool_call><function=f><parameter=s>\nx\n<parameter=t", "", [("f", '{"s": "x')]),
        ("<tool_call><function=f><parameter=n>\n12", "", [("f", '{"n": ')]),
        ("<tool_call><function=f><parameter=n>\n12\n</parameter>\n", "", [("f", '{"n": 12')]),
        ("<tool_call><function=g></function>\n</tool", "", [("g", "{}")]),
    ],
)
def test_answers(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(text) == Answer(content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<",
        "<tool_call>",
        "<tool_call>\n<func",
        "<tool_call>\n<function=f",
        "<tool_call>\nx<function=>",
        "<tool_call></tool_call>\n",
        "<tool_call><function=></function></tool_call>",
        "<tool_call><function=f\n></function></tool_call>",
        "<tool_call><function= \n",
        "<function=unknown></function>",
        "Write <function=NAME> and <parameter=KEY>.",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    ],
)
def test_what_is_no_call_is_content_exactly(text: str) -> None:
    assert parsed(text) == Answer(text, [])


def test_without_parallel_calls_the_answer_ends_after_the_first() -> None:
    assert parsed(f"a{call('g')} b {call('f')}", parallel=False) == Answer("a", [("g", "{}")])
    assert parsed(f"<tool_call><function=g> b {call('f')}", parallel=False) == Answer("", [("g", "{")])


def test_strings_are_handed_on_as_they_come_and_other_values_at_their_end() -> None:
    pieces = ["I", "\n<tool_call>\n<function=f>", "\n<parameter=s>\n", "one\n", "two", "</", "b>\n</parameter>"]
    pieces += ["<parameter=n>1", "2</parameter>", "</function>", "</tool_call>"]
    assert parse_deltas("qwen3_coder", pieces, TOOLS) == [
        [Content("I")],
        [CallBegin(0, "id-0", "f"), Arguments(0, "{")],
        [Arguments(0, '"s": "')],
        [Arguments(0, "one")],
        [Arguments(0, "\\ntwo")],
        [],
        [Arguments(0, '</b>"')],
        [Arguments(0, ', "n": ')],
        [Arguments(0, "12")],
        [Arguments(0, "}")],
        [],
        [],
    ]


keys = st.text(st.characters(exclude_characters="<>\r\n", exclude_categories=["Cs"]), min_size=1, max_size=4)
keys = keys.map(str.strip).filter(bool)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, tricky_text | json_values.filter(lambda value: not isinstance(value, str))), st.data())
def test_well_formed_answers_however_they_are_cut(arguments: dict[str, Any], data: st.DataObject) -> None:
    """Strings as text, others as JSON, as the model's template shows it them."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
    schema = {key: {"type": kinds.get(type(value), "object")} for key, value in arguments.items()}
    arguments = {k: v.replace("</parameter>", "") if isinstance(v, str) else v for k, v in arguments.items()}
    parameters = [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in arguments.items()]
    if any("</parameter>" in value for _, value in parameters):
        return
    text = call("f", *parameters)
    whole = parse("qwen3_coder", [text], [tool("f", schema)])
    assert [(name, json.loads(written)) for name, written in whole.calls] == [("f", arguments)]
    assert whole.content == ""
    for pieces in (text, data.draw(cut_anywhere(text))):
        assert parse("qwen3_coder", pieces, [tool("f", schema)]) == whole
