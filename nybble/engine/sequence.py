"""`Sequence`: one completion's progress: its tokens, how many of them the KV cache holds, and in which blocks.

Owns: tokens, counters, block ids, finish reason. Does not know: other sequences, queues, text, torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.core.outputs import FinishReason, TokenLogprobs
from nybble.core.request import Request
from nybble.engine.block_pool import Prefix, Root, salted_root
from nybble.engine.constraint import Matcher

NO_SALT = salted_root("")


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One of the `n` completions of a request.

    It is *waiting* (no slot), *running* (has a slot) or *finished* (has a finish reason).
    """

    request: Request
    index: int
    rank: tuple[int, int]  # (priority, number of arrival); lower runs earlier
    max_length: int  # prompt and longest output, in tokens
    seed: int
    end_token_ids: frozenset[int] = frozenset()
    bad_word_ids: list[list[int]] = field(default_factory=list)
    prefix_root: Root = NO_SALT  # where its prefix chain starts: shared with whom it may share blocks
    num_shareable_tokens: int = 0  # blocks within the first this-many tokens may be shared

    matcher: Matcher | None = None  # where it stands in its grammar, by the ids that the host knows
    token_ids: list[int] = field(init=False)  # the prompt and all sampled ids that the host knows
    num_prompt_tokens: int = field(init=False)
    num_in_flight: int = 0  # ids being sampled: they follow token_ids
    num_computed_tokens: int = 0  # K/V written, or scheduled to be
    num_cached_tokens: int = 0  # prompt tokens found in the cache when first scheduled
    num_preemptions: int = 0
    was_scheduled: bool = False

    slot: int | None = None
    is_started: bool = False  # the runner was told about this stay in the slot
    block_ids: list[int] = field(default_factory=list)
    num_registered_blocks: int = 0  # the first this-many blocks are in the prefix table …
    prefix: Prefix = field(init=False)  # … under this prefix

    prompt_logprobs: list[TokenLogprobs | None] | None = field(init=False)  # so far; None when not wanted
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.prefix = self.prefix_root
        wants_them = self.request.params.prompt_logprobs is not None and self.index == 0
        self.prompt_logprobs = [None] if wants_them else None  # nothing predicts the first token

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def priority(self) -> int:
        return self.rank[0]

    @property
    def num_tokens(self) -> int:
        """Length with the ids in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def waits_for_id(self) -> bool:
        """Whether the id in flight decides which may come next."""
        return self.matcher is not None and self.num_in_flight > 0

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the next token is missing from the KV cache."""
        return self.num_tokens - self.num_computed_tokens > 1

    @property
    def num_output_tokens(self) -> int:
        """Ids that the host knows and were sampled."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """How many leading tokens may come from the prefix cache.

        Not the last one: its logits are wanted. Not those whose logits tell the prompt's missing log-probabilities.
        """
        most = min(len(self.token_ids) - 1, self.num_shareable_tokens)
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens:
            most = min(most, len(self.prompt_logprobs) - 1)
        return most

    def take_prompt_logprobs(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Add those that positions `start` … tell; positions computed again after a preemption are skipped."""
        assert self.prompt_logprobs is not None
        num_known = len(self.prompt_logprobs) - (start + 1)
        assert num_known >= 0, f"prompt log-probabilities of positions before {start} are missing"
        self.prompt_logprobs.extend(entries[num_known:])

    def leave_slot(self) -> None:
        """Forget everything that belongs to a stay on the device; the caller took back blocks and slot."""
        self.slot = None
        self.is_started = False
        self.block_ids = []  # a new list: a step in flight may still refer to the old one
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0
        self.prefix = self.prefix_root
