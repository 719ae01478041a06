"""ReasoningSplitter: think tags split an answer, however it is cut; without them it is content, exactly."""

import itertools
import time
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.text.reasoning import ReasoningSplitter, may_think, opens_thinking


def split(pieces: Iterable[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    thoughts = [splitter.push(piece) for piece in pieces]
    thoughts.append(splitter.finish())
    first_content = next((i for i, thought in enumerate(thoughts) if thought.content), len(thoughts))
    assert not any(thought.reasoning for thought in thoughts[first_content + 1 :])
    return "".join(thought.reasoning for thought in thoughts), "".join(thought.content for thought in thoughts)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nWell.\n\nSo.\n</think>\n\nYes.\n", False, "Well.\n\nSo.", "Yes.\n"),
        ("\n <think>a</think>b", False, "a", "b"),
        ("a\n</think>\n\nb", True, "a", "b"),
        ("\n<think>\na</think>b", True, "a", "b"),
        ("<think>\n\n</think>\n\nb", False, "", "b"),
        ("\n</think>\n\nb", True, "", "b"),
        ("</think>b", True, "", "b"),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("<think> a <think> <b></b> </think>\n b", False, " a <think> <b></b> ", " b"),
        # Without the tag at the beginning all is content.
        ("  plain\n", False, "", "  plain\n"),
        ("The tag <think> </think>.", False, "", "The tag <think> </think>."),
        ("a</think>b", False, "", "a</think>b"),
        # Cut off.
        ("", False, "", ""),
        ("", True, "", ""),
        (" \n", False, "", " \n"),
        ("<thin", False, "", "<thin"),
        ("<thin", True, "<thin", ""),
        ("\n\n", True, "", ""),
        ("<think>a\n</thi", False, "a\n</thi", ""),
        ("<think>a\n", False, "a", ""),
        ("<think>a</think>\n", False, "a", ""),
    ],
)
def test_answers(text: str, opened: bool, reasoning: str, content: str) -> None:
    for cut in range(len(text) + 1):
        assert split([text[:cut], text[cut:]], opened) == (reasoning, content)
    assert split(text, opened) == (reasoning, content)


fragments = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "<thi", "\n", "\r\n", " ", "a", "é", "text. "])


@settings(max_examples=800, deadline=None)
@given(st.lists(fragments, max_size=15).map("".join), st.booleans(), st.data())
def test_however_it_is_cut_the_answer_is_the_same(text: str, opened: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = split([text], opened)
    assert split(pieces, opened) == split(text, opened) == whole
    # By definition, on the whole text.
    begin = text.lstrip(" \t\r\n")
    if not opened and not begin.startswith("<think>"):
        assert whole == ("", text)
        return
    rest = begin.removeprefix("<think>") if begin.startswith("<think>") else text
    reasoning, _, content = rest.partition("</think>")
    assert whole == (reasoning.strip("\r\n"), content.lstrip("\r\n"))


def test_all_that_is_certain_is_handed_on() -> None:
    splitter = ReasoningSplitter()
    assert not splitter.is_reasoning
    pieces = ["<think>", "\nHm", ", 1 <", " 2", "\n", "So</thi", "nk>", "\n", "\nYes", "\n", "<think>"]
    thoughts = [splitter.push(piece) for piece in pieces]
    assert [thought.reasoning for thought in thoughts] == ["", "Hm", ", 1 ", "< 2", "", "\nSo", "", "", "", "", ""]
    assert [thought.content for thought in thoughts] == ["", "", "", "", "", "", "", "", "Yes", "\n", "<think>"]
    assert splitter.finish() == ("", "")
    assert ReasoningSplitter(opened=True).is_reasoning


def test_what_prompts_and_templates_show() -> None:
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("<think> is a tag<|im_start|>assistant\n")
    assert may_think("{{ content.split('</think>')[-1] }}")
    assert not may_think("{{ content }}")


@pytest.mark.parametrize("text", ["word. ", "\n", "<", "</think", "<think>", "a\n</"])
@pytest.mark.parametrize("begin", ["", "<think>", "<think></think>"])
def test_a_character_costs_microseconds_and_no_more_later(begin: str, text: str) -> None:
    def seconds(answer: str) -> float:
        splitter = ReasoningSplitter()
        start = time.thread_time()
        for character in answer:
            splitter.push(character)
        splitter.finish()
        return time.thread_time() - start

    few, many = begin + text * (2000 // len(text)), begin + text * (20000 // len(text))
    short, long = (min(seconds(answer) for _ in range(3)) for answer in (few, many))
    assert long / len(many) < 15e-6
    assert long / len(many) < 3 * short / len(few)
