"""Writers of prompts with a wanted number of tokens: exact with the model's tokenizer, near without it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Protocol

import msgspec

from nybble.core.errors import ConfigError

_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out "
    "many then them these so some her would make like him into time has look two more write go see number no way "
    "could people my than first water been call who oil its now find long down day did get come made may part over "
    "new sound take only little work know place year live me back give most very after thing our just name good "
    "sentence man think say great where help through much before line right too mean old any same tell boy follow "
    "came want show also around form three small set put end does another well large must big even such because "
    "turn here why ask went men read need land different home us move try kind hand picture again change off play "
    "spell air away animal house point page letter mother answer found study still learn should world "
)
WORDS = _TEXT.split()
"""Common English words: one token each, in nearly every vocabulary of a large model."""


class WordCost(msgspec.Struct, frozen=True):
    """What a server's tokenizer makes of `WORDS`, measured: tokens = fixed + each × words."""

    fixed: float = 0.0
    each: float = 1.0


class PromptWriter(Protocol):
    """Writes text of about `num_tokens` tokens. `is_exact`: exactly so many."""

    is_exact: bool

    def write(self, draw: random.Random, num_tokens: int) -> str | list[int]: ...

    def count(self, text: str) -> int: ...


class WordWriter:
    """Without a tokenizer."""

    is_exact = False

    def __init__(self, cost: WordCost) -> None:
        self._cost = cost

    def write(self, draw: random.Random, num_tokens: int) -> str:
        num_words = max(1, round((num_tokens - self._cost.fixed) / self._cost.each))
        return " ".join(draw.choices(WORDS, k=num_words))

    def count(self, text: str) -> int:
        return round(len(text.split()) * self._cost.each) or 1


class IdWriter:
    """Random token ids, for a model without a tokenizer.

    Args:
        vocab_size: ids are below it.
    """

    is_exact = True

    def __init__(self, vocab_size: int) -> None:
        self._ids = range(min(1000, vocab_size // 2), vocab_size)  # the first ones are bytes and signs

    def write(self, draw: random.Random, num_tokens: int) -> list[int]:
        return draw.choices(self._ids, k=num_tokens)

    def count(self, text: str) -> int:
        return max(1, len(text) // 4)


class TokenWriter:
    """With the tokenizer: words that are one token each, checked and mended by encoding the text.

    Args:
        path: directory of the checkpoint.
        as_ids: give the token ids themselves, which the completions route of some servers takes.
        num_fixed: tokens that the server puts around a prompt (a chat template, a first token).
    """

    is_exact = True

    def __init__(self, path: Path, *, as_ids: bool = False, num_fixed: int = 0) -> None:
        from nybble.text.tokenizer import Tokenizer

        self._tokenizer = Tokenizer.load(path)
        self._as_ids = as_ids
        self._num_fixed = num_fixed
        texts = {i: self._tokenizer.token_text(i) for i in range(self._tokenizer.vocab_size)}
        self._ids = [i for i, text in texts.items() if re.fullmatch(r" [a-z]{2,12}", text)]
        if len(self._ids) < 50:  # a vocabulary without such words: letters, and whatever else is one token by itself
            some = [i for i, text in texts.items() if re.fullmatch(r"[ -~]+", text)][:5000]
            self._ids = [i for i in some if self._tokenizer.encode(texts[i], add_special_tokens=False) == [i]]
        if not self._ids:
            raise ConfigError(f"--tokenizer {path}: no token of it can be written as text; leave it out")

    def write(self, draw: random.Random, num_tokens: int) -> str | list[int]:
        if self._as_ids:
            return draw.choices(self._ids, k=num_tokens)
        wanted = max(1, num_tokens - self._num_fixed)
        ids = draw.choices(self._ids, k=wanted)
        for _ in range(8):
            text = self._tokenizer.decode(ids)
            num_found = self.count(text)
            if num_found == wanted:
                break
            if num_found > wanted:
                ids = ids[: max(1, len(ids) - (num_found - wanted))]
            else:
                ids += draw.choices(self._ids, k=wanted - num_found)
        return text

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))
