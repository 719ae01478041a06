"""`Scheduler`: which sequences run in the next step, and with how many tokens.

Owns: the waiting and running queues; the token, slot and block budgets; preemption. Does not know: the model, text,
what the runner does with a batch, why a sequence ends.

Both queues are sorted by rank: arrival, under the `priority` policy after priority. Only the best-ranked waiting
sequence is ever admitted, and a running one that needs a block takes it from the worst-ranked, so the best-ranked
sequence always moves on and every sequence has its turn.

A sequence gets the blocks for all tokens it has when it is admitted; after that it grows a block at a time. A prefill
in several chunks therefore never waits for memory, and no one is admitted behind it before its last chunk. So whoever
comes next finds all blocks of an equal prompt: nothing else is needed for the completions of a request to share them.

A block becomes findable when the step that fills it is scheduled. Steps run in order, and in a step every layer writes
K/V before attention reads, so whoever finds the block reads what it promises. `fail` undoes this when a step raises.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from nybble.core.batch import BAD_LOGITS, DEVICE_TOKEN, NO_TOKEN, Batch, Row, SequenceStart, StepResult
from nybble.core.config import ResolvedConfig
from nybble.core.outputs import FinishReason, TokenLogprobs
from nybble.engine.block_pool import BlockPool
from nybble.engine.sequence import Sequence

_rank = attrgetter("rank")


@dataclass(slots=True)
class Step:
    """One scheduled step. The lists go along with `batch.rows`."""

    batch: Batch
    num_tokens_left: int  # of the step's token budget
    has_open_prefill: bool = False  # a row computes only a part of what its sequence lacks
    started: list[Sequence] = field(default_factory=list)  # along with batch.starts
    sequences: list[Sequence | None] = field(default_factory=list)  # None: the row's outcome is void
    block_tables: list[list[int]] = field(default_factory=list)  # as they were; a sequence may lose its blocks


class Scheduler:
    """Continuous batching over one KV cache of `num_blocks` blocks."""

    def __init__(self, config: ResolvedConfig, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size, keeps_idle_blocks=config.enable_prefix_caching)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._block_size = block_size
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def schedule(self) -> Step | None:
        """Choose the next step: decodes, then running prefills, then waiting sequences. None if none can run now."""
        step = Step(Batch(step_id=self.num_steps, rows=[]), self._max_num_batched_tokens)
        urgent = self._schedule_urgent(step)
        num_preemptions = self.num_preemptions
        prefills = self._schedule_decodes(step)
        self._schedule_prefills(step, prefills)
        for sequence in urgent:
            insort(self.running, sequence, key=_rank)
        if self.num_preemptions == num_preemptions:  # else memory is short
            self._schedule_waiting(step)
        if not step.sequences:
            return None
        self.num_steps += 1
        return step

    def apply(self, step: Step, result: StepResult) -> Iterator[tuple[Sequence, int, TokenLogprobs | None]]:
        """Enter a step's outcome; yield each sequence that got a token, with it (or BAD_LOGITS, or NO_TOKEN)."""
        outcome = zip(
            step.batch.rows, step.sequences, result.token_ids, result.logprobs, result.prompt_logprobs, strict=True
        )
        for position, (row, sequence, token_id, logprobs, prompt_logprobs) in enumerate(outcome):
            # The one place where a token is dropped: its sequence ended while this step was in flight.
            if sequence is None or sequence.finish_reason is not None:
                continue
            if prompt_logprobs is not None:
                sequence.take_prompt_logprobs(row.start, prompt_logprobs)
            if token_id is None:
                continue
            sequence.num_in_flight -= 1
            if token_id == BAD_LOGITS:
                self.pool.forget(step.block_tables[position])  # broken K/V must not reach others
            elif token_id != NO_TOKEN:
                sequence.token_ids.append(token_id)
            yield sequence, token_id, logprobs

    def fail(self, step: Step, later: Iterable[Step]) -> list[Sequence]:
        """Undo a step that raised, while the steps `later` are in flight. Returns the sequences that fail with it.

        Others that found the blocks which this step was to fill start over, and what they have in flight is void.
        """
        spoiled: set[int] = set()
        for row, block_ids in zip(step.batch.rows, step.block_tables, strict=True):
            spoiled.update(block_ids[row.start // self._block_size :])
        self.pool.forget(spoiled)
        failed = [s for s in step.sequences if s is not None and s.finish_reason is None]
        for sequence in self.running.copy():
            if sequence not in failed and not spoiled.isdisjoint(sequence.block_ids):
                first = next(i for i, block_id in enumerate(sequence.block_ids) if block_id in spoiled)
                self.pool.forget(sequence.block_ids[first:])
                for other in later:
                    other.sequences = [None if s is sequence else s for s in other.sequences]
                sequence.num_in_flight = 0
                self._preempt(sequence)
        return failed

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, whatever it is doing, and take back what it holds."""
        assert sequence.finish_reason is None, f"{sequence.request.request_id} ended twice"
        sequence.finish_reason = reason
        if sequence.slot is None:
            _remove(self.waiting, sequence)
        else:
            _remove(self.running, sequence)
            self._take_back(sequence)

    def _schedule_urgent(self, step: Step) -> list[Sequence]:
        """Let waiting sequences take the place of running ones of lower priority; return those who did.

        This comes first, so that no row has to be taken back: a victim has none yet, and the reserve that `_admit`
        keeps means that the decodes which follow find their blocks. Without priorities this does nothing.
        """
        urgent: list[Sequence] = []
        while self.waiting and self.running:
            sequence, victim = self.waiting[0], self.running[-1]
            if sequence.priority >= victim.priority or sequence.num_in_flight:
                break
            if urgent and step.num_tokens_left <= len(self.running):  # one token is kept for each running sequence
                break
            if any(s.is_prefilling and s.priority <= sequence.priority for s in self.running):
                break
            if self._admit(sequence):
                urgent.append(sequence)
                self._add_prefill(step, sequence, step.num_tokens_left - len(self.running))
            else:
                self._preempt(victim)
        return urgent

    def _schedule_decodes(self, step: Step) -> list[Sequence]:
        """Give a row to each running sequence that lacks one token; return those that lack more."""
        prefills = []
        for sequence in self.running:  # preemption pops from its end, which is never behind this loop
            num_tokens = len(sequence.token_ids) + sequence.num_in_flight
            num_computed = sequence.num_computed_tokens
            if num_tokens - num_computed > 1:
                prefills.append(sequence)
            # Else the token in flight is the last one, or decides which may come next.
            elif num_tokens < sequence.max_length and not sequence.waits_for_id:
                grows = num_computed == len(sequence.block_ids) * self._block_size
                if not grows:
                    self._add_row(step, sequence, 1, [])
                elif self._find_block(sequence):
                    sequence.block_ids.append(self.pool.allocate())
                    self._add_row(step, sequence, 1, sequence.block_ids[-1:])
        return prefills

    def _schedule_prefills(self, step: Step, prefills: list[Sequence]) -> None:
        for sequence in prefills:
            if step.num_tokens_left > 0 and sequence.slot is not None:  # no slot: a decode took its blocks
                self._add_prefill(step, sequence, step.num_tokens_left)

    def _schedule_waiting(self, step: Step) -> None:
        while self.waiting and step.num_tokens_left > 0 and not step.has_open_prefill:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                return
            insort(self.running, sequence, key=_rank)
            self._add_prefill(step, sequence, step.num_tokens_left)

    def _admit(self, sequence: Sequence) -> bool:
        """Take the first waiting sequence out of the queue, if there are a slot and blocks for it."""
        # Each running sequence may soon need a block; without this reserve the newcomer would be thrown out again.
        num_free = self.pool.num_free - len(self.running)
        if not self._free_slots or num_free <= 0 or sequence.num_in_flight:  # an id in flight must be known first
            return False
        max_blocks = sequence.num_reusable_tokens // self._block_size
        hit = self.pool.match(sequence.prefix_root, sequence.token_ids, max_blocks)
        num_new_blocks = -(-len(sequence.token_ids) // self._block_size) - len(hit.block_ids)
        if num_new_blocks > num_free - hit.num_idle:
            return False
        self.pool.share(hit.block_ids)
        sequence.block_ids = hit.block_ids + [self.pool.allocate() for _ in range(num_new_blocks)]
        sequence.num_computed_tokens = len(hit.block_ids) * self._block_size
        sequence.num_registered_blocks = len(hit.block_ids)
        sequence.prefix = hit.prefix
        sequence.slot = self._free_slots.pop()
        if not sequence.was_scheduled:
            self._count_hit(sequence)
        del self.waiting[0]
        return True

    def _count_hit(self, sequence: Sequence) -> None:
        sequence.was_scheduled = True
        if sequence.index == 0:  # the other completions find what the first one just computed: no merit of the cache
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_query_tokens += sequence.num_prompt_tokens if self.pool.keeps_idle_blocks else 0
            self.num_prefix_hit_tokens += sequence.num_cached_tokens

    def _add_prefill(self, step: Step, sequence: Sequence, most_tokens: int) -> None:
        num_missing = sequence.num_tokens - sequence.num_computed_tokens
        step.has_open_prefill |= num_missing > most_tokens
        self._add_row(step, sequence, min(num_missing, most_tokens), [])

    def _add_row(self, step: Step, sequence: Sequence, num_new_tokens: int, new_block_ids: list[int]) -> None:
        """Let the step compute the next tokens of a sequence that has the blocks for them."""
        slot = sequence.slot
        assert slot is not None
        if not sequence.is_started:
            step.batch.starts.append(_start_of(sequence, slot))
            step.started.append(sequence)
            sequence.is_started = True
            new_block_ids = sequence.block_ids.copy()
        start = sequence.num_computed_tokens
        end = start + num_new_tokens
        num_known = len(sequence.token_ids)
        token_ids = sequence.token_ids[start:end]
        if end > num_known:
            token_ids.append(DEVICE_TOKEN)
        sample = end == num_known + sequence.num_in_flight
        row = Row(
            slot=slot,
            start=start,
            token_ids=token_ids,
            new_block_ids=new_block_ids,
            sample=sample,
            num_output_tokens=num_known + sequence.num_in_flight - sequence.num_prompt_tokens,
            mask=sequence.matcher.mask if sample and sequence.matcher is not None else None,
            prompt_logprobs=sequence.prompt_logprobs is not None and start < sequence.num_prompt_tokens - 1,
        )
        step.batch.rows.append(row)
        step.sequences.append(sequence)
        step.block_tables.append(sequence.block_ids)
        step.num_tokens_left -= num_new_tokens
        sequence.num_computed_tokens = end
        sequence.num_in_flight += sample
        num_shareable = min(end, num_known, sequence.num_shareable_tokens)
        if num_shareable >= (sequence.num_registered_blocks + 1) * self._block_size:
            self._register(sequence, num_shareable // self._block_size)

    def _register(self, sequence: Sequence, num_blocks: int) -> None:
        """Make the first `num_blocks` blocks of a sequence findable."""
        for i in range(sequence.num_registered_blocks, num_blocks):
            token_ids = sequence.token_ids[i * self._block_size : (i + 1) * self._block_size]
            sequence.prefix = self.pool.register(sequence.block_ids[i], sequence.prefix, token_ids)
        sequence.num_registered_blocks = num_blocks

    def _find_block(self, sequence: Sequence) -> bool:
        """Make sure that a block is free, at the cost of the worst-ranked. False if `sequence` had to go itself."""
        while self.pool.num_free == 0 and sequence.slot is not None:
            self._preempt(self.running[-1])
        return sequence.slot is not None

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue. Its tokens stay; their K/V is computed again, or found."""
        _remove(self.running, sequence)
        self._take_back(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_rank)

    def _take_back(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.pool.free(sequence.block_ids)
        self._free_slots.append(sequence.slot)
        sequence.leave_slot()


def _start_of(sequence: Sequence, slot: int) -> SequenceStart:
    return SequenceStart(
        slot=slot,
        params=sequence.request.params,
        prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],  # the request's list may have been changed
        output_token_ids=sequence.token_ids[sequence.num_prompt_tokens :],
        seed=sequence.seed,
        end_token_ids=sorted(sequence.end_token_ids),
        bad_word_ids=sequence.bad_word_ids,
    )


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a queue sorted by rank."""
    position = bisect_left(queue, sequence.rank, key=_rank)
    assert queue[position] is sequence, f"{sequence.request.request_id} is not in the queue"
    del queue[position]
