"""`BlockPool`: the KV cache's blocks as numbers: who holds one, what it contains, which one is given up next.

Owns: block ids, reference counts, the prefix table, the order of eviction. Does not know: sequences, scheduling policy,
K/V tensors.

A *prefix* is a number that stands for the contents of a whole chain of full blocks. A full block is found under the
pair (prefix of the blocks before it, its own tokens); a chain starts from a root, made of the user's `cache_salt`. The
table finds the pair by its hash and compares the tokens themselves, and a prefix number is never given to a second
chain, so colliding hashes cannot serve the KV of other tokens.

A block whose reference count falls to 0 keeps its contents while no one needs the space. Such *idle* blocks are given
up in the order in which they were freed, and a sequence frees its last block first: a chain loses its tail before its
head. Every operation costs as much as the blocks it names.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Root = tuple[Literal["salt", "private"], str | int]
"""Where a chain starts. The tag keeps what users choose apart from the pool's own numbers, whatever type it has."""

Prefix = int | Root
"""A chain of full blocks, or the root that it starts from."""


def salted_root(cache_salt: str) -> Root:
    """The root that all who use this salt share."""
    return "salt", cache_salt


class PrefixMatch(NamedTuple):
    """The cached head of a token sequence."""

    block_ids: list[int]
    prefix: Prefix  # of all these blocks together
    num_idle: int  # how many of them count as free until they are taken


class BlockPool:
    """All blocks of one KV cache.

    Args:
        num_blocks: ids are 0 … num_blocks − 1.
        block_size: tokens a block.
        keeps_idle_blocks: False forgets what a block contains as soon as no one holds it.
    """

    def __init__(self, num_blocks: int, block_size: int, *, keeps_idle_blocks: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keeps_idle_blocks = keeps_idle_blocks
        self._ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # no holder, no contents: a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # no holder, known contents: the next to go is first
        self._block_of: dict[tuple[Prefix, tuple[int, ...]], int] = {}
        self._key_of: list[tuple[Prefix, tuple[int, ...]] | None] = [None] * num_blocks
        self._prefix_of = [0] * num_blocks  # valid where _key_of is set
        self._serials = itertools.count()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def new_root(self) -> Root:
        """A root that no one else has: its chains are found only by those who were given it."""
        return "private", next(self._serials)

    def allocate(self) -> int:
        """Take a free block with arbitrary contents. The caller made sure that there is one."""
        if self._blank:
            block_id = self._blank.pop()
        else:
            assert self._idle, f"allocate: all {self.num_blocks} blocks are in use"
            block_id, _ = self._idle.popitem(last=False)
            self._unregister(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_ids: Iterable[int]) -> None:
        """Become one more holder of each of these blocks (found by `match`)."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._idle[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in the sequence's order."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            assert self._ref_counts[block_id] == 0, f"block {block_id} was freed more often than taken"
            if self._key_of[block_id] is None:
                self._blank.append(block_id)
            elif self.keeps_idle_blocks:
                self._idle[block_id] = None
            else:
                self._unregister(block_id)
                self._blank.append(block_id)

    def match(self, root: Root, token_ids: Sequence[int], max_blocks: int) -> PrefixMatch:
        """Find the longest cached head of `token_ids` in whole blocks, at most `max_blocks`. Takes nothing."""
        prefix: Prefix = root
        block_ids, num_idle = list[int](), 0
        for start in range(0, max_blocks * self.block_size, self.block_size):
            block_id = self._block_of.get((prefix, tuple(token_ids[start : start + self.block_size])))
            if block_id is None:
                break
            block_ids.append(block_id)
            prefix = self._prefix_of[block_id]
            num_idle += self._ref_counts[block_id] == 0
        return PrefixMatch(block_ids, prefix, num_idle)

    def register(self, block_id: int, prefix: Prefix, token_ids: Sequence[int]) -> Prefix:
        """Make a held block findable: it contains the K/V of `token_ids` after `prefix`. Returns the longer prefix.

        Where an equal block is known already, the newer one takes its place: whoever continues the chain holds it, so
        it will not be evicted before its continuation.
        """
        key = (prefix, tuple(token_ids))
        twin = self._block_of.get(key)
        if twin is None:
            self._prefix_of[block_id] = next(self._serials)
        elif twin != block_id:
            self._prefix_of[block_id] = self._prefix_of[twin]
            self.forget([twin])
        self._block_of[key] = block_id
        self._key_of[block_id] = key
        return self._prefix_of[block_id]

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make these blocks unfindable, held or not; for instance because what was to fill them failed."""
        for block_id in block_ids:
            if self._key_of[block_id] is not None:
                self._unregister(block_id)
                if self._ref_counts[block_id] == 0:
                    del self._idle[block_id]
                    self._blank.append(block_id)

    def forget_all(self) -> None:
        self.forget(block_id for block_id, key in enumerate(self._key_of) if key is not None)

    def _unregister(self, block_id: int) -> None:
        key = self._key_of[block_id]
        assert key is not None
        del self._block_of[key]
        self._key_of[block_id] = None
