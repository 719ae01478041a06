"""The engine–runner contract: one step as plain ints, and what comes back from it.

The engine decides who runs and writes a `Batch`; the runner executes it and knows nothing of queues or users. The two
meet only here. A batch is a few KB and msgspec-serializable, so that it can be broadcast to several ranks as it is.

A *slot* is a row of the runner's per-sequence state (block table, sampling parameters, last sampled token), in
[0, max_num_seqs). A sequence keeps its slot from its `SequenceStart` until the scheduler gives the slot to another one.
Only changes travel: a start once per (re)admission, then each row brings just its new block ids.

One step may be in flight: step *n* is submitted before the ids of step *n−1* are known on the host. A row whose input
is such an id carries `DEVICE_TOKEN`, and the runner puts in the id which that slot sampled last, on the device.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from nybble.core.outputs import TokenLogprobs
from nybble.core.sampling import SamplingParams

DEVICE_TOKEN = -1
"""In `Row.token_ids`: the id this slot sampled in its last sampled row (known on the device only)."""

BAD_LOGITS = -1
"""In `StepResult.token_ids`: the row's logits were not finite; the sequence must end with an error."""

NO_TOKEN = -2
"""In `StepResult.token_ids`: what the parameters forbid is every token; the sequence must end with an error."""


class SequenceStart(msgspec.Struct, kw_only=True):
    """A sequence takes a slot, for the first time or again after a preemption. Resets all state of the slot."""

    slot: int
    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []  # generated before a preemption: penalties must count them
    seed: int = 0  # params.seed, else drawn by the engine; differs between the n completions
    end_token_ids: list[int] = []  # EOS and stop ids: masked while fewer than params.min_tokens are generated
    bad_word_ids: list[list[int]] = []  # params.bad_words as token ids; a word may be several ids long


class Row(msgspec.Struct, kw_only=True):
    """The tokens of one sequence in this step, at positions start … start + len(token_ids) − 1."""

    slot: int
    start: int
    token_ids: list[int]  # at least one; DEVICE_TOKEN can stand for the last only
    new_block_ids: list[int] = []  # appended to the slot's block table before the step
    sample: bool = False  # sample the next token from the last position's logits
    num_output_tokens: int = 0  # generated so far, in-flight ones counted: the RNG counter, and min_tokens' measure
    mask: bytes | None = None  # tokens that may be sampled: token v at bit v % 32 of little-endian int32 word v // 32
    prompt_logprobs: bool = False  # also return the log-probabilities of the prompt tokens that these positions predict


class Batch(msgspec.Struct, kw_only=True):
    """One step. Rows are in scheduling order; no slot occurs twice."""

    step_id: int
    rows: list[Row]
    starts: list[SequenceStart] = []

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class StepResult(msgspec.Struct, kw_only=True):
    """What a step sampled. Lists have one entry for each row of the batch, in its order."""

    token_ids: list[int | None]  # None for rows that did not sample; BAD_LOGITS or NO_TOKEN for a failed row
    logprobs: list[TokenLogprobs | None]  # where params.logprobs was set; without decoded_token
    prompt_logprobs: list[
        list[TokenLogprobs] | None
    ]  # for position p: of prompt token p + 1 (fewer at the prompt's end)


class PendingStep(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Raises whatever the step raised."""
        ...


class Runner(Protocol):
    """What the engine needs of whoever executes batches."""

    num_blocks: int  # KV blocks that exist; ids are 0 … num_blocks − 1
    block_size: int  # tokens a block
    is_async: bool  # submit returns before the step is done, so a step in flight hides the host's work

    def submit(self, batch: Batch) -> PendingStep: ...

    def close(self) -> None: ...
