"""Detokenizer: what is streamed equals the whole decode, cut where a search of the whole text would cut it."""

import random
import time
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import (
    TEXT,
    byte_fallback_tokenizer_json,
    byte_level_tokenizer_json,
    metaspace_tokenizer_json,
)

from nybble.core.sampling import SamplingParams
from nybble.text.detokenizer import Detokenizer
from nybble.text.tokenizer import Tokenizer

KINDS = {
    "byte level": byte_level_tokenizer_json,
    "byte fallback": byte_fallback_tokenizer_json,
    "metaspace": metaspace_tokenizer_json,
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(KINDS[kind]()))


def stream(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, prompt: tuple[int, ...] = ()
) -> tuple[list[str], str | None]:
    """The texts in their order, and the stop string."""
    detokenizer = Detokenizer(tokenizer, params, prompt)
    texts = []
    for token_id in ids:
        update = detokenizer.append(token_id)
        texts.append(update.text)
        if update.stop is not None:
            assert detokenizer.finish() == ""
            return texts, update.stop
    return [*texts, detokenizer.finish()], None


def first_stop(text: str, stops: list[str], num_ignored: int = 0) -> tuple[int, str] | None:
    """By definition: the stop string that is complete first, the longest if several are. Returns its end."""
    for end in range(num_ignored + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


def cut(text: str, stops: list[str], num_ignored: int = 0, keep: bool = False) -> str:
    found = first_stop(text, stops, num_ignored)
    return text if found is None else text[: found[0] - (0 if keep else len(found[1]))]


kinds = st.sampled_from(list(KINDS))


@st.composite
def kind_and_ids(draw: st.DrawFn) -> tuple[str, list[int]]:
    kind = draw(kinds)
    size = tokenizer_of(kind).vocab_size
    if draw(st.booleans()):  # random ids: broken characters, special tokens, ids beyond the vocabulary
        return kind, draw(st.lists(st.integers(0, size + 5), max_size=40))
    text = draw(st.text(alphabet="the llé你好🙂END.,! \n", max_size=40))
    return kind, tokenizer_of(kind).encode(text, add_special_tokens=False)


@settings(max_examples=400, deadline=None)
@given(kind_and_ids(), st.booleans())
def test_streamed_text_equals_whole_decode(case: tuple[str, list[int]], skip_special: bool) -> None:
    kind, ids = case
    tokenizer = tokenizer_of(kind)
    texts, _ = stream(tokenizer, ids, SamplingParams(skip_special_tokens=skip_special))
    assert "".join(texts) == tokenizer.decode(ids, skip_special)


@settings(max_examples=400, deadline=None)
@given(kind_and_ids(), st.lists(st.text("thel é你N.", min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_stop_strings_equal_a_search_of_the_whole_text(
    case: tuple[str, list[int]], stops: list[str], keep: bool
) -> None:
    kind, ids = case
    tokenizer = tokenizer_of(kind)
    texts, _ = stream(tokenizer, ids, SamplingParams(stop=stops, include_stop_str_in_output=keep))
    assert "".join(texts) == cut(tokenizer.decode(ids), stops, keep=keep)


@settings(max_examples=400, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_stop_strings_over_two_letters(text: str, stops: list[str], data: st.DataObject) -> None:
    """Every kind of overlap; token borders anywhere; min_tokens."""
    tokenizer = tokenizer_of("byte level")
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    min_tokens = data.draw(st.integers(0, 4))
    ids = [tokenizer.encode(piece) for piece in pieces]
    flat = [token_id for piece in ids for token_id in piece]
    params = SamplingParams(stop=stops, min_tokens=min_tokens, max_tokens=None)
    texts, stop = stream(tokenizer, flat, params)
    num_ignored = len(tokenizer.decode(flat[: max(0, min_tokens - 1)]))
    if len(flat) < min_tokens:
        num_ignored = len(text)
    assert "".join(texts) == cut(text, stops, num_ignored)
    found = first_stop(text, stops, num_ignored)
    assert stop == (None if found is None else found[1])


def texts_of(text: str, **params: object) -> list[str]:
    """Streams a text letter by letter."""
    tokenizer = tokenizer_of("byte level")
    ids = [tokenizer.encode(letter)[0] for letter in text]
    return stream(tokenizer, ids, SamplingParams(**params))[0]  # type: ignore[arg-type]


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assert texts_of("xaby", stop="abc") == ["x", "", "", "aby", ""]
    assert texts_of("aab", stop="ab") == ["", "a", ""]
    assert texts_of("xyz", stop="abc") == ["x", "y", "z", ""]
    assert texts_of("xa", stop="abc") == ["x", "", "a"]
    assert texts_of("ab", stop="ab", include_stop_str_in_output=True) == ["", "ab"]
    assert texts_of("abx", stop=["b", "abc"], min_tokens=3, max_tokens=9) == ["", "", "abx", ""]


def test_unfinished_characters_are_held_back() -> None:
    tokenizer = tokenizer_of("byte level")
    ids = [tokenizer.backend.token_to_id(letter) for letter in "ðŁĻĤ"]  # the four bytes of 🙂
    assert stream(tokenizer, ids, SamplingParams())[0] == ["", "", "", "🙂", ""]
    assert stream(tokenizer, ids[:2], SamplingParams())[0] == ["", "", "\ufffd"]


def test_a_leading_space_stays_where_a_text_is_continued() -> None:
    tokenizer = tokenizer_of("byte fallback")
    the = tokenizer.backend.token_to_id("▁the")
    h = tokenizer.backend.token_to_id("▁h")
    assert "".join(stream(tokenizer, [the, h], SamplingParams())[0]) == "the h"
    assert "".join(stream(tokenizer, [the, h], SamplingParams(), prompt=(1, h))[0]) == " the h"
    assert "".join(stream(tokenizer, [the, h], SamplingParams(), prompt=(1,))[0]) == "the h"  # BOS shows no text
    metaspace = tokenizer_of("metaspace")
    ids = metaspace.encode("quick fox")
    for after in ((), (1,) * 9, (metaspace.vocab_size,) * 9):  # special tokens, padding beyond the vocabulary
        assert "".join(stream(metaspace, ids, SamplingParams(), prompt=(*ids, *after))[0]) == " quick fox"
    assert "".join(stream(metaspace, ids, SamplingParams(), prompt=(1,) * 9)[0]) == "quick fox"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_change_nothing(kind: str) -> None:
    """Embeddings are padded, so such ids can be sampled; the word after one keeps its space."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("quick fox jumps", add_special_tokens=False)
    padded = [token_id for pair in zip(ids, [tokenizer.vocab_size] * len(ids), strict=True) for token_id in pair]
    assert "".join(stream(tokenizer, padded, SamplingParams())[0]) == tokenizer.decode(ids)


def test_a_stop_string_in_held_bytes_cuts_at_the_end() -> None:
    tokenizer = tokenizer_of("byte fallback")
    ids = [tokenizer.backend.token_to_id(token) for token in ("e", "<0x4F>", "<0x4B>")]  # "eOK", the run never ends
    texts, _ = stream(tokenizer, ids, SamplingParams(stop="OK"))
    assert "".join(texts) == "e"


@pytest.mark.parametrize("stops", [None, ["Observation:", "</answer>", "\n\nQ:", "x" * 5000]])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_token_costs_microseconds_and_no_more_later(kind: str, stops: list[str] | None) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(" ".join(TEXT).replace("Observation:", "").replace("</answer>", "")) * 40
    random.Random(0).shuffle(ids)

    def seconds(num_tokens: int) -> float:
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stops), [])
        begin = time.perf_counter()
        for token_id in ids[:num_tokens]:
            detokenizer.append(token_id)
        return time.perf_counter() - begin

    few, many = (min(seconds(n) for _ in range(5)) for n in (len(ids) // 8, len(ids)))
    assert many / len(ids) < 15e-6
    assert many < 8 * few * 2.5  # linear, with room for noise
