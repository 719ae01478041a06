"""What holds for every format: random texts that look like calls, any cutting, and the cost of a character."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.tool_calls.driver import cut_anywhere, parse, tool

from nybble.text.tool_calls import FORMATS, new_call_id, parser_for

TOOLS = [tool("f", {"s": {"type": "string"}, "n": {"type": ["integer", "null"]}}), tool("g")]

fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=", "<function=f>", "</function>", "<parameter=", "<parameter=s>"),
        *("</parameter>", "<|python_tag|>", "<", ">", "</", "f>", "n>", "tool_call>", "\n", " ", ";", ",", ":", "\\"),
        *(
            "{",
            "}",
            "[",
            "]",
            '"',
            '"name"',
            '"arguments"',
            '"parameters"',
            '"f"',
            '"g"',
            "null",
            "true",
            "1",
            "-",
            ".5",
        ),
        *(
            '{"name": "f", "arguments": {',
            '{"name": "g", "parameters": {"a": ',
            '"\\u00e9🙂"',
            "a",
            "é",
            "\x00",
            "\ud800",
        ),
        *('{"name": "f", "arguments": {"a": [1, {}]}}', "<function=f>\n<parameter=n>\n", "\n</parameter>\n</function>"),
    ]
)
look_alikes = st.lists(fragments, max_size=25).map("".join)
formats = pytest.mark.parametrize("form", FORMATS)


@pytest.mark.slow
@formats
@settings(max_examples=500, deadline=None)
@given(text=look_alikes, parallel=st.booleans(), data=st.data())
def test_however_it_is_cut_the_answer_is_the_same(form: str, text: str, parallel: bool, data: st.DataObject) -> None:
    whole = parse(form, [text], TOOLS, parallel)
    assert parse(form, text, TOOLS, parallel) == whole
    assert parse(form, data.draw(cut_anywhere(text)), TOOLS, parallel) == whole
    if not whole.calls:
        assert whole.content == text
    if not parallel:
        assert len(whole.calls) <= 1


@formats
@settings(max_examples=200, deadline=None)
@given(text=look_alikes, data=st.data())
def test_calls_before_a_text_do_not_change_what_it_says(form: str, text: str, data: st.DataObject) -> None:
    """No state is left over from a finished call."""
    call = {
        "hermes": '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "llama3_json": '{"name": "g", "parameters": {}}',
        "qwen3_coder": "<tool_call><function=g></function></tool_call>",
    }[form]
    alone = parse(form, ["." + text], TOOLS)
    after = parse(form, [call + "." + text], TOOLS)
    assert after == alone._replace(calls=[("g", "{}"), *alone.calls])


CHARACTER_COST = {
    "text": "Some words, a < b, and so on.\n" * 20,
    "spaces": " \n" * 300,
    "tags": "<tool_call>" * 50,
    "half tags": "<tool_cal</tool_c" * 40,
    "hermes call": '<tool_call>{"name": "f", "arguments": {"a": "b\\n", "c": [1, 2.5, {"d": null}]}}</tool_call>\n' * 8,
    "brackets": '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 600,
    "string": '<tool_call>{"name": "f", "arguments": {"a": "' + "word é \\n \n" * 60,
    "number": '<tool_call>{"arguments": ' + "1" * 600,
    "nested": '<tool_call>{"x": "' * 60,
    "llama calls": '{"name": "f", "parameters": {"a": "b"}}; ' * 15,
    "llama separators": '{"name": "f", "parameters": {}}' + " }" * 300,
    "coder call": "<tool_call><function=f><parameter=n>12</parameter></function></tool_call>" * 8,
    "coder string": "<tool_call><function=f><parameter=s>" + "word\n<parameter=x>\n" * 40,
    "coder number": "<tool_call><function=f><parameter=n>" + "1\n" * 300,
    "coder name": "<tool_call><function=" + "f" * 600,
    "coder key": "<tool_call><function=f><parameter=" + "f" * 600,
}


@formats
@pytest.mark.parametrize("kind", CHARACTER_COST)
def test_a_character_costs_microseconds_and_no_more_later(form: str, kind: str) -> None:
    part = CHARACTER_COST[kind]

    def seconds(text: str) -> float:
        parser = parser_for(form)(TOOLS)
        begin = time.thread_time()
        for character in text:
            parser.push(character)
        parser.finish()
        return time.thread_time() - begin

    # The last of the part is what repeats, the first may be a call's beginning.
    few, many = part + part[-500:] * 4, part + part[-500:] * 40
    short, long = (min(seconds(text) for _ in range(3)) for text in (few, many))
    assert long / len(many) < 20e-6
    assert long / len(many) < 3 * short / len(few)


@formats
def test_an_answer_in_one_piece_costs_no_more(form: str) -> None:
    text = "".join(CHARACTER_COST.values()) * 20
    begin = time.thread_time()
    parse(form, [text], TOOLS)
    assert (time.thread_time() - begin) / len(text) < 10e-6


@formats
def test_an_answer_may_hold_several_calls_unless_the_request_says_no(form: str) -> None:
    call = {
        "hermes": '<tool_call>{"name": "g"}</tool_call>',
        "llama3_json": '{"name": "g"};',
        "qwen3_coder": "<function=g></function>",
    }[form]
    for options, num_calls, done in (({}, 2, False), ({"parallel": False}, 1, True)):
        parser = parser_for(form)(TOOLS, **options)
        parser.push(call)
        assert parser.done is done
        parser.push(call)
        assert parser.num_calls == num_calls


def test_ids_of_calls() -> None:
    call_id = new_call_id()
    assert call_id.startswith("call_")
    assert len(bytes.fromhex(call_id.removeprefix("call_"))) == 12
    assert call_id != new_call_id()


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"pythonic.*hermes, llama3_json, qwen3_coder"):
        parser_for("pythonic")
