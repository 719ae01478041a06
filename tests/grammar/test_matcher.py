"""`Matcher`: masks, ends and reasoning, over the embedded model's vocabulary."""

import itertools
from collections.abc import Iterator
from contextlib import suppress

import pytest
from support.grammars import EOS, allowed, compiling, form
from support.server import tiny_tokenizer

from nybble.core.structured import Reasoning, StructuredOutputs
from nybble.grammar.compiler import GrammarCompiler
from nybble.grammar.matcher import Grammar, Matcher

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with compiling() as compiler:
        yield compiler


def open_matcher(compiler: GrammarCompiler, wanted: StructuredOutputs, reasoning: Reasoning | None = None) -> Matcher:
    return compiler.compile(wanted).result(timeout=60).open(reasoning)


def write(matcher: Matcher, text: str) -> None:
    for byte in text:
        token_id = TOKENIZER.backend.token_to_id(byte)
        assert token_id is not None
        matcher.accept(token_id)


def test_only_what_fits_is_allowed_and_the_end_when_complete(compiler: GrammarCompiler) -> None:
    matcher = open_matcher(compiler, form(regex="ab*"))
    texts = {TOKENIZER.token_text(token_id) for token_id in allowed(matcher)}
    assert "a" in texts
    assert all(text.startswith("a") and set(text[1:]) <= {"b"} for text in texts)
    assert EOS not in allowed(matcher)
    write(matcher, "a")
    assert EOS in allowed(matcher)
    assert not matcher.is_finished
    matcher.accept(EOS)
    assert matcher.is_finished


def test_a_form_that_is_full_is_finished(compiler: GrammarCompiler) -> None:
    matcher = open_matcher(compiler, form(choice=["ab", "ac"]))
    write(matcher, "a")
    assert not matcher.is_finished
    write(matcher, "c")
    assert matcher.is_finished


def test_special_tokens_are_no_part_of_a_form(compiler: GrammarCompiler) -> None:
    matcher = open_matcher(compiler, form(regex=r"[\s\S]*x"))
    assert not TOKENIZER.special_ids & set(allowed(matcher))
    assert max(allowed(matcher)) < TOKENIZER.vocab_size, "embeddings past the vocabulary have no text"


def test_a_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler) -> None:
    matcher = open_matcher(compiler, form(regex="a"))
    with pytest.raises(ValueError, match="not what the grammar allows"):
        write(matcher, "b")


def test_matchers_do_not_share_their_place(compiler: GrammarCompiler) -> None:
    one = open_matcher(compiler, form(choice=["ab", "ac"]))
    other = open_matcher(compiler, form(choice=["ab", "ac"]))
    before = other.mask
    write(one, "a")
    assert other.mask == before != one.mask


def test_a_form_begins_behind_the_reasoning(compiler: GrammarCompiler) -> None:
    matcher = open_matcher(compiler, form(choice=["ab"]), "is_open")
    assert matcher.mask is None
    write(matcher, "hm</thi")
    assert matcher.mask is None
    write(matcher, "nk>")
    assert TOKENIZER.token_text(allowed(matcher)[0]).startswith("a")
    write(matcher, "ab")
    assert matcher.is_finished


def test_an_answer_may_begin_with_reasoning() -> None:
    from support.grammars import tiny_vocabulary

    vocabulary = tiny_vocabulary()
    think, end = len(vocabulary.pieces) - 2, len(vocabulary.pieces) - 1
    vocabulary.pieces[think], vocabulary.pieces[end] = b"<think>", b"</think>"
    compiler = GrammarCompiler(lambda: vocabulary)
    try:
        grammar: Grammar = compiler.compile(form(choice=["a"])).result(timeout=60)
        thinks, answers = grammar.open("may_open"), grammar.open("may_open")
        assert think in allowed(thinks)
        thinks.accept(think)
        assert thinks.mask is None
        write(thinks, "x")
        thinks.accept(end)
        assert think not in allowed(thinks)
        write(thinks, "a")
        write(answers, "a")
        assert thinks.is_finished
        assert answers.is_finished
        assert think not in allowed(grammar.open())
    finally:
        compiler.close()


@pytest.mark.slow
def test_a_form_that_takes_too_long_to_follow_is_left(compiler: GrammarCompiler) -> None:
    """What the compiling process does not find out: each token of this one costs more than the one before."""
    matcher = open_matcher(compiler, form(grammar='root ::= root root | "a" | ""'))
    with pytest.raises(ValueError, match="takes too long"):
        write(matcher, "a" * 2000)


def test_many_that_follow_a_slow_form_share_what_one_may_take(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compiler.compile(form(regex="(a|b)*")).result(timeout=60)
    matchers = [grammar.open() for _ in range(20)]
    now = itertools.count()
    monkeypatch.setattr("nybble.grammar.matcher.time.thread_time", lambda: next(now) / 10)
    num_followed = 0
    for _ in range(10):
        for matcher in matchers[:]:
            try:
                write(matcher, "a")
                num_followed += 1
            except ValueError:
                matchers.remove(matcher)
    assert not matchers
    assert 4 <= num_followed <= 6, "at 0.1 s each"
    assert next(now) <= 2 * (num_followed + 3), "who is refused later costs nothing, until some is earned again"
    monkeypatch.undo()
    for _ in range(20):  # it is earned again
        with suppress(ValueError):
            write(grammar.open(), "a")
    write(grammar.open(), "a")
