"""`encode_bad_words`: words that must not be generated, as the token sequences that would spell them."""

from __future__ import annotations

from collections.abc import Iterable

from nybble.text.tokenizer import Tokenizer


def encode_bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    """Token ids of each word at the start of a text and, where that is another token of its own, after a space.

    As in vLLM: the second form counts only when it differs in its first id and is as long; else it is the first form
    with a separate space before it, which the first form covers.
    """
    encoded: list[list[int]] = []
    for word in words:
        bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        if bare:
            encoded.append(bare)
        if bare and spaced[0] != bare[0] and len(spaced) == len(bare):
            encoded.append(spaced)
    return encoded
