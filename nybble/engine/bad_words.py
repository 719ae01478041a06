"""`encode_bad_words`: words that must not be generated, as the token sequences that would spell them."""

from __future__ import annotations

from collections.abc import Iterable

from nybble.core.checks import shown
from nybble.core.errors import RequestError
from nybble.text.tokenizer import Tokenizer


def encode_bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    """Token ids of each word at the start of a text and, where that is another token of its own, after a space.

    As in vLLM: the second form counts only when it differs in its first id and is as long; else it is the first form
    with a separate space before it, which the first form covers. A word of white space alone is taken as it is.

    Raises:
        RequestError: the tokenizer has no tokens for a word.
    """
    encoded: list[list[int]] = []
    for word in words:
        text = word.lstrip()
        bare = tokenizer.encode(text or word, add_special_tokens=False)
        if not bare:
            raise RequestError(
                f"bad_words: this model's tokenizer has no tokens for {shown(word)}; leave it out",
                parameter="bad_words",
            )
        encoded.append(bare)
        if text:
            spaced = tokenizer.encode(" " + text, add_special_tokens=False)
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                encoded.append(spaced)
    return encoded
