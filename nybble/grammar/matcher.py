"""`Matcher`: where a completion stands in its grammar, and which tokens may follow.

Lives on the host with its sequence, so a preemption, which takes the sequence's K/V only, leaves it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import xgrammar

from nybble.core.structured import Reasoning

GRACE_SECONDS = 0.5
SECONDS_PER_TOKEN = 0.005
"""The engine's thread computes masks, so a grammar that takes longer than these (of processor time) would hold up
everyone."""
TOO_SLOW = "finding the tokens that its grammar allows takes too long; make it simpler"

BEGIN_THINKING, END_THINKING = b"<think>", b"</think>"


class _Budget:
    """The time that a grammar's followers may take, together: a hundred of a slow one must not take a hundred times as
    long. Each token earns some. Overdrawn, it refuses unseen as many tokens as would have earned it back.
    """

    def __init__(self) -> None:
        self._seconds = GRACE_SECONDS

    @contextmanager
    def token(self) -> Iterator[None]:
        """
        Raises:
            ValueError: nothing is left, or now that this token has been followed.
        """
        self._seconds = min(GRACE_SECONDS, self._seconds + SECONDS_PER_TOKEN)
        if self._seconds < 0:
            raise ValueError(TOO_SLOW)
        begin = time.thread_time()
        yield
        self._seconds = max(-GRACE_SECONDS, self._seconds - (time.thread_time() - begin))
        if self._seconds < 0:
            raise ValueError(TOO_SLOW)


class Grammar:
    """A compiled grammar; many completions may follow it."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, pieces: list[bytes], end_token_ids: list[int]) -> None:
        self.num_bytes = int(compiled.memory_size_bytes)
        self._compiled = compiled
        self._pieces = pieces
        self._end_token_ids = frozenset(end_token_ids)
        self._budget = _Budget()

    def open(self, reasoning: Reasoning | None = None) -> Matcher:
        """A matcher at the grammar's beginning.

        Raises:
            ValueError: the tokens that may come first took too long to find.
        """
        matcher = xgrammar.GrammarMatcher(self._compiled)
        return Matcher(matcher, self._budget, self._pieces, self._end_token_ids, reasoning)


class Matcher:
    """Follows one completion.

    mask: the tokens that may come next, a bit each: token v at bit v % 32 of int32 word v // 32. None: all.
    is_finished: no token may come any more.
    """

    def __init__(
        self,
        matcher: xgrammar.GrammarMatcher,
        budget: _Budget,
        pieces: list[bytes],
        end_token_ids: frozenset[int],
        reasoning: Reasoning | None,
    ) -> None:
        self._matcher = matcher
        self._budget = budget
        self._pieces = pieces
        self._end_token_ids = end_token_ids
        self._is_thinking = reasoning == "is_open"
        self._may_think = reasoning == "may_open"
        self._tail = b""
        self._words = np.zeros((1, -(-len(pieces) // 32)), dtype=np.int32)
        self.is_finished = False
        self.mask: bytes | None = None
        if not self._is_thinking:
            with budget.token():
                self._find_mask()

    def accept(self, token_id: int) -> None:
        """Go on by a token that the mask allowed.

        Raises:
            ValueError: it was not allowed, or its successors took too long to find.
        """
        piece = self._pieces[token_id]
        if self._is_thinking:
            self._think(piece)
            return
        if self._may_think and piece == BEGIN_THINKING:
            self._may_think, self._is_thinking, self.mask = False, True, None
            return
        self._may_think = False
        with self._budget.token():
            if not self._matcher.accept_token(token_id):
                raise ValueError(f"token {token_id} is not what the grammar allows")
            if self._matcher.is_terminated():
                self.is_finished, self.mask = True, None
            else:
                self._find_mask()

    def _think(self, piece: bytes) -> None:
        # What a token writes behind the tag is lost to the grammar: with tags that are tokens, as usual, nothing.
        self._tail = (self._tail + piece)[-len(END_THINKING) - len(piece) :]
        if END_THINKING in self._tail:
            self._is_thinking = False
            with self._budget.token():
                self._find_mask()

    def _find_mask(self) -> None:
        self._words.fill(-1)
        self._matcher.fill_next_token_bitmask(self._words)
        words = self._words[0].copy()
        if len(self._pieces) % 32:  # bits past the vocabulary
            words[-1] &= (1 << len(self._pieces) % 32) - 1
        if self._may_think and BEGIN_THINKING in self._pieces:
            token_id = self._pieces.index(BEGIN_THINKING)
            words.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
        elif self._only_ends(words):
            self.is_finished = True
        self.mask = words.tobytes()

    def _only_ends(self, words: np.ndarray) -> bool:
        rest = words.view(np.uint32).copy()
        for token_id in self._end_token_ids:
            rest[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        return not rest.any() and bool(self._matcher.is_completed())
