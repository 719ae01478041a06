"""`Vocabulary`: what each token writes, as xgrammar needs to know it. Crosses to the compiling process as it is."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from nybble.text.tokenizer import Tokenizer

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Tokens that forms may ask for, though some vocabularies call them special."""


class Vocabulary(msgspec.Struct, frozen=True):
    """
    pieces: the bytes of each token; b"" can never be generated inside of a form.
    end_token_ids: end a text whose form is complete.
    """

    pieces: list[bytes]
    end_token_ids: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, end_token_ids: Iterable[int], vocab_size: int) -> Vocabulary:
        """
        Args:
            vocab_size: tokens that the model has logits for: often more than the tokenizer knows, seldom fewer.
        """
        hidden = tokenizer.special_ids - {tokenizer.backend.token_to_id(tag) for tag in TAGS}
        pieces = [b"" if token_id in hidden else tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        return cls(pieces, sorted(token_id for token_id in end_token_ids if token_id < vocab_size))

    def info(self):  # type: ignore[no-untyped-def]
        """xgrammar's `TokenizerInfo`; equal in all processes."""
        import xgrammar

        return xgrammar.TokenizerInfo(
            self.pieces, xgrammar.VocabType.RAW, vocab_size=len(self.pieces), stop_token_ids=self.end_token_ids
        )
