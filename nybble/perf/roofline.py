"""The roofline (Williams et al. 2009): the least time of a step on a machine, part by part, and what it follows from.

A part takes max(bytes / read rate, flops / math rate); parts run one after the other, so a step takes their sum. No
launch, no gap, no cache: it is a floor, never a forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nybble.perf.machines import Machine
from nybble.perf.model_shape import ModelShape
from nybble.perf.step_cost import Kind, Part, Work, parts_of

Bound = Literal["memory", "compute", "link"]
MOST_BATCH = 1 << 16

DEQUANTIZE_OPS = 1.125
"""Integer and half-precision lanes' instructions for one 4-bit weight: of eight in a word, four masks and a shift
(Kim et al. 2022 turn two codes into two halves with one), and four multiply-adds of two for scale and zero."""


@dataclass(frozen=True)
class Floor:
    """The least time of one part, all its launches together."""

    part: Part
    memory_seconds: float
    math_seconds: float
    link_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.math_seconds, self.link_seconds)

    @property
    def bound(self) -> Bound:
        if self.link_seconds == self.seconds:
            return "link"
        return "memory" if self.memory_seconds >= self.math_seconds else "compute"


@dataclass(frozen=True)
class Roofline:
    """A model on one or several equal machines (tensor parallel).

    Args:
        shape: of one device's part.
        machine: its rates are taken as they are; `Machine.sustained` gives those that programs reach.
    """

    shape: ModelShape
    machine: Machine
    dtype: torch.dtype
    kv_itemsize: int | None = None

    def floors(self, work: Work) -> list[Floor]:
        parts = parts_of(self.shape, work, self.dtype, kv_itemsize=self.kv_itemsize)
        return [self.floor(part) for part in parts]

    def floor(self, part: Part) -> Floor:
        machine, link = self.machine, 0.0
        if part.link_bytes:
            assert machine.link_bytes_per_second is not None, "check_link comes first"
            link = part.count * (machine.link_seconds + part.link_bytes / machine.link_bytes_per_second)
        return Floor(part, part.num_bytes / machine.read_bytes_per_second, part.flops / machine.flops_per_second, link)

    def seconds(self, work: Work) -> float:
        return sum(floor.seconds for floor in self.floors(work))

    def decode_tok_s(self, batch: int, context_len: int) -> float:
        return batch / self.seconds(Work.decode(batch, context_len))

    def prefill_tok_s(self, num_tokens: int) -> float:
        return num_tokens / self.seconds(Work.prefill(num_tokens))

    def crossover_batch(self) -> int | None:
        """The batch from which the weights' products take longer to compute than to read; None: it is past 65,536.

        Attention has none: each sequence reads its own keys, so it stays bound by memory at any batch.
        """

        def is_compute_bound(batch: int) -> bool:
            floors = [floor for floor in self.floors(Work.decode(batch, 1)) if floor.part.kind == "weight GEMMs"]
            return sum(f.math_seconds for f in floors) >= sum(f.memory_seconds for f in floors)

        if not is_compute_bound(MOST_BATCH):
            return None
        low, high = 0, MOST_BATCH  # memory-bound, compute-bound
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_compute_bound(middle) else (middle, high)
        return high

    def kv_bytes_per_token(self) -> int:
        return self.shape.kv_bytes_per_token(self.kv_itemsize or self.dtype.itemsize)

    def dequantize_seconds(self) -> float | None:
        """Of turning every 4-bit weight into a number once, if nothing else ran on the integer lanes. A kernel hides it
        behind the reading; one that does not overlap the two pays both. None: nothing is quantized, or rate unknown."""
        num_weights = self.shape.num_quantized_weights
        if not num_weights or self.machine.integer_ops_per_second is None:
            return None
        return num_weights * DEQUANTIZE_OPS / self.machine.integer_ops_per_second


def by_kind(floors: Sequence[Floor]) -> dict[Kind, float]:
    """Seconds of each kind that there is."""
    seconds: dict[Kind, float] = {}
    for floor in floors:
        seconds[floor.part.kind] = seconds.get(floor.part.kind, 0.0) + floor.seconds
    return seconds
