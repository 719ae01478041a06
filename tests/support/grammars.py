"""Grammars over the embedded model's vocabulary, and texts made by walking along them at random."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from support.server import tiny_tokenizer

from nybble.core.structured import Reasoning, StructuredOutputs
from nybble.grammar.compiler import GrammarCompiler
from nybble.grammar.matcher import Grammar, Matcher
from nybble.grammar.vocabulary import Vocabulary

EOS = tiny_tokenizer().eos_token_id
assert EOS is not None


def tiny_vocabulary() -> Vocabulary:
    return Vocabulary.of(tiny_tokenizer(), [EOS], tiny_tokenizer().vocab_size + 40)


@contextmanager
def compiling(**options: Any) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tiny_vocabulary, **options)
    try:
        yield compiler
    finally:
        compiler.close()


def allowed(matcher: Matcher) -> list[int]:
    assert matcher.mask is not None
    bits = np.unpackbits(np.frombuffer(matcher.mask, dtype=np.uint8), bitorder="little")
    return [int(token_id) for token_id in np.flatnonzero(bits)]


PARAMETER_END = b"\n</parameter>\n"


def walk(grammar: Grammar, seed: int, max_tokens: int = 2000, reasoning: Reasoning | None = None) -> str:
    """A text that the grammar allows, to its end. After a while it prefers what closes, for chance would not."""
    choose = random.Random(seed)
    matcher = grammar.open(reasoning)
    text = b""
    for count in range(max_tokens):
        token_ids = allowed(matcher)
        if count > 40:
            token_ids = _closing(text, token_ids) or token_ids
        if EOS in token_ids and (count > 40 or choose.random() < 0.5):
            break
        token_id = choose.choice([i for i in token_ids if i != EOS])
        text += tiny_tokenizer().token_bytes(token_id)
        matcher.accept(token_id)
        if matcher.is_finished:
            break
    else:
        raise AssertionError(f"no end after {max_tokens} tokens: {text[-200:]!r}")
    return text.decode(errors="replace")


def _closing(text: bytes, token_ids: list[int]) -> list[int]:
    if EOS in token_ids:
        return [EOS]
    of_text = {tiny_tokenizer().token_bytes(token_id): token_id for token_id in token_ids}
    for length in range(len(PARAMETER_END) - 1, -1, -1):
        following = PARAMETER_END[length : length + 1]
        if text.endswith(PARAMETER_END[:length]) and following in of_text and (length or not text.endswith(b" ")):
            return [of_text[following]]
    return [token_id for piece, token_id in of_text.items() if piece[:1] in (b'"', b"}", b"]", b"<")]


def form(**fields: Any) -> StructuredOutputs:
    return StructuredOutputs(**fields)
