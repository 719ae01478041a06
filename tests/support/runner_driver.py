"""Drives a `ModelRunner` by hand, without an engine: hands out blocks in scrambled order and writes batches."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from nybble.core.batch import DEVICE_TOKEN, Batch, Row, SequenceStart
from nybble.core.config import EngineConfig, HardwareFacts, ModelFacts, ResolvedConfig, resolve
from nybble.core.sampling import SamplingParams
from nybble.runner.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)


def small_config(
    *, device: str = "cpu", vocab_size: int = 61, max_model_len: int = 64, **settings: Any
) -> ResolvedConfig:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 8, **settings}
    return resolve(
        EngineConfig(model="test", max_model_len=max_model_len, **settings),
        ModelFacts(max_position_embeddings=max_model_len, dtype="float32", vocab_size=vocab_size),
        HardwareFacts(device=device, supports_bfloat16=True),
    )


@dataclass
class Progress:
    """One sequence as the driver sees it. Sampled tokens may still be on the device."""

    params: SamplingParams
    prompt: list[int]
    seed: int
    end_token_ids: list[int]
    bad_word_ids: list[list[int]]
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sampled: int = 0  # including those in flight
    num_blocks: int = 0
    started: bool = False


class Driver:
    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.sequences: dict[int, Progress] = {}
        self.free_blocks = list(range(runner.num_blocks))
        random.Random(0).shuffle(self.free_blocks)
        self.step_id = 0
        self.logprobs: dict[int, list] = {}
        self.prompt_logprobs: dict[int, list] = {}

    def add(
        self,
        slot: int,
        prompt: list[int],
        params: SamplingParams = GREEDY,
        *,
        seed: int = 0,
        end_token_ids: tuple[int, ...] = (),
        bad_word_ids: tuple[list[int], ...] = (),
    ) -> None:
        """Put a sequence into a slot, in place of the one it held."""
        self.sequences[slot] = Progress(params, list(prompt), seed, list(end_token_ids), list(bad_word_ids))
        self.logprobs[slot], self.prompt_logprobs[slot] = [], []

    def restart(self, slot: int) -> None:
        """What a preemption does: the sequence begins again, its output now part of what must be computed."""
        sequence = self.sequences[slot]
        sequence.started, sequence.num_computed, sequence.num_blocks = False, 0, 0

    def batch(self, new_tokens: dict[int, int]) -> Batch:
        """A step that computes so many tokens of each slot, in this order; rows that reach their end sample."""
        batch = Batch(step_id=self.step_id, rows=[])
        self.step_id += 1
        for slot, count in new_tokens.items():
            sequence = self.sequences[slot]
            if not sequence.started:
                sequence.started = True
                batch.starts.append(self._start(slot, sequence))
            batch.rows.append(self._row(slot, sequence, count))
        return batch

    def _start(self, slot: int, sequence: Progress) -> SequenceStart:
        return SequenceStart(
            slot=slot,
            params=sequence.params,
            prompt_token_ids=sequence.prompt,
            output_token_ids=list(sequence.output),
            seed=sequence.seed,
            end_token_ids=sequence.end_token_ids,
            bad_word_ids=sequence.bad_word_ids,
        )

    def _row(self, slot: int, sequence: Progress, count: int) -> Row:
        known = sequence.prompt + sequence.output
        length = len(sequence.prompt) + sequence.num_sampled
        start, end = sequence.num_computed, sequence.num_computed + count
        assert end <= length, "nothing is known of tokens that were not sampled yet"
        blocks = -(-end // self.runner.block_size) - sequence.num_blocks
        sequence.num_blocks += blocks
        sequence.num_computed = end
        sample = end == length
        row = Row(
            slot=slot,
            start=start,
            token_ids=[*known, DEVICE_TOKEN][start:end],
            new_block_ids=[self.free_blocks.pop() for _ in range(blocks)],
            sample=sample,
            num_output_tokens=sequence.num_sampled,
            prompt_logprobs=sequence.params.prompt_logprobs is not None and start < len(sequence.prompt) - 1,
        )
        sequence.num_sampled += sample
        return row

    def apply(self, batch: Batch, pending: Any) -> None:
        """Take in a step's results."""
        result = pending.result()
        for index, row in enumerate(batch.rows):
            if result.token_ids[index] is not None:
                self.sequences[row.slot].output.append(result.token_ids[index])
                self.logprobs[row.slot].append(result.logprobs[index])
            self.prompt_logprobs[row.slot] += result.prompt_logprobs[index] or []

    def step(self, new_tokens: dict[int, int]) -> None:
        batch = self.batch(new_tokens)
        self.apply(batch, self.runner.submit(batch))

    def prefill(self, *slots: int) -> None:
        """Compute everything that is known of these slots, in one step."""
        lengths = {slot: self.sequences[slot] for slot in slots}
        self.step({slot: len(s.prompt) + s.num_sampled - s.num_computed for slot, s in lengths.items()})

    def generate(self, *slots: int, num_tokens: int) -> list[list[int]]:
        """Prefill, then decode in step until each has `num_tokens` outputs."""
        self.prefill(*slots)
        for _ in range(num_tokens - 1):
            self.step(dict.fromkeys(slots, 1))
        return [self.sequences[slot].output for slot in slots]

    def generate_overlapped(self, *slots: int, num_tokens: int) -> list[list[int]]:
        """As `generate`, with each step submitted before the results of the one before are read."""
        in_flight = []
        for index in range(num_tokens):
            lengths = {slot: len(self.sequences[slot].prompt) if index == 0 else 1 for slot in slots}
            batch = self.batch(lengths)
            in_flight.append((batch, self.runner.submit(batch)))
            if len(in_flight) == 2:
                self.apply(*in_flight.pop(0))
        self.apply(*in_flight.pop())
        return [self.sequences[slot].output for slot in slots]
