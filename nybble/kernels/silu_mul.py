"""The gated activation of an MLP.

gate_up [T, 2·I] = gate | up → silu(gate) · up [T, I],   silu(a) = a / (1 + e^−a)
bytes: 3·T·I·itemsize;  flops: ~6·T·I
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nybble.kernels import triton
from nybble.kernels.cpu import rows
from nybble.kernels.op import Cost, Impl, Op, always


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True)
class Case:
    tokens: int
    intermediate: int

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        gate_up = torch.randn(self.tokens, 2 * self.intermediate, generator=generator, device=device)
        return {"gate_up": (gate_up * 5).to(dtype)}


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 128)
    yield Case(3, 1000)
    yield Case(20, 72)
    if large:
        for intermediate in (4864, 8960, 18944, 27648, 29568):
            for tokens in (1, 64, 2048):
                yield Case(tokens, intermediate)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    elements = case.tokens * case.intermediate
    return Cost(3 * elements * dtype.itemsize, 6 * elements)


OP = Op(
    name="silu_mul",
    reference=Impl(name="reference", supports=always, launch=reference),
    impls=(
        Impl(name="triton", supports=triton.why_not, launch=triton.deferred("silu_mul")),
        Impl(name="c", supports=rows.silu_mul_why_not, launch=rows.silu_mul),
    ),
    cases=cases,
    cost=cost,
)
