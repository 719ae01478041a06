"""`Planner`: which loads a machine's memory holds, with the shortest steps unless it is told otherwise."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.perf.machines import Machine
from nybble.perf.memory_model import MemoryPlan, plan_memory
from nybble.perf.model_shape import ModelShape
from nybble.perf.workload_model import Load

MOST_SEQS = 1024
STEP_TOKENS = (512, 1024, 2048, 4096, 8192)
CPU_STEP_TOKENS = (64, 128, 256, 512)
HALF = torch.float16


@dataclass(frozen=True)
class Planner:
    """
    Args:
        step_tokens: numbers of tokens a step that may be recommended, the least first.
    """

    machine: Machine
    load: Load
    step_tokens: Sequence[int]

    def choices(self, num_seqs: int) -> list[int]:
        """Steps that have room for a prompt beside the tokens of all sequences."""
        return [tokens for tokens in self.step_tokens if tokens > num_seqs] or [2 * num_seqs]

    def plan(self, part: ModelShape, num_seqs: int, tokens: int | None = None) -> MemoryPlan:
        """Of one device; steps are the shortest, unless `tokens` says."""
        tokens = tokens or self.choices(num_seqs)[0]
        return plan_memory(part, self.machine, HALF.itemsize, max_num_seqs=num_seqs, max_num_batched_tokens=tokens)

    def holds(self, part: ModelShape, num_seqs: int, tokens: int | None = None) -> bool:
        """So many requests of the load, whole."""
        return self.plan(part, num_seqs, tokens).most_kv_tokens >= num_seqs * self.load.tokens

    def most_seqs(self, part: ModelShape) -> int:
        """That it holds."""
        return bisect(range(1, MOST_SEQS + 1), False, key=lambda num_seqs: not self.holds(part, num_seqs))
