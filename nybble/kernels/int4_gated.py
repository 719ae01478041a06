"""The first half of a gated MLP in one operation: silu(x · Wgᵀ) · (x · Wuᵀ), W = Wg above Wu in 4 bits.

    x [M, K], W [2·I, K] as an `Int4Weight` → y [M, I]
    bytes and flops: those of int4_linear, but y is half as wide;  silu as in silu_mul

Models use it where it has an implementation besides the reference, else int4_linear and silu_mul one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nybble.kernels import int4_linear, silu_mul
from nybble.kernels.cuda import packed, w4a16, w4a16_wgmma
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Cost, Impl, Op, always


def reference(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    return silu_mul.reference(int4_linear.reference(x, weight, None))


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    out_features: int  # I
    group_size: int
    has_outliers: bool = False

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        arguments = self._linear().arguments(device, dtype, generator)
        return {"x": arguments["x"], "weight": arguments["weight"]}

    def _linear(self) -> int4_linear.Case:
        return int4_linear.Case(
            self.tokens, self.in_features, 2 * self.out_features, self.group_size, has_outliers=self.has_outliers
        )


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 128, 64, 32)
    yield Case(3, 384, 72, 64, has_outliers=True)
    yield Case(17, 256, 200, 128, has_outliers=True)
    yield Case(70, 160, 136, 32)
    if large:
        for shapes in int4_linear.MODEL_SHAPES.values():
            k, n = shapes[2]
            for tokens in (1, 7, 16, 64, 200):
                yield Case(tokens, k, n // 2, 128 if k % 128 == 0 else 64, has_outliers=tokens == 7)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    linear = int4_linear.cost(case._linear(), dtype)
    elements = case.tokens * case.out_features
    return Cost(linear.bytes - elements * dtype.itemsize, linear.flops + 6 * elements)


WGMMA = Impl(
    name="wgmma", supports=w4a16_wgmma.supports, prepare=w4a16_wgmma.prepare_gated, launch=w4a16_wgmma.launch_gated
)
MMA = Impl(name="mma", supports=packed.supports, prepare=w4a16.prepare_gated, launch=w4a16.launch_gated)

OP = Op(
    name="int4_gated",
    reference=Impl(name="reference", supports=always, prepare=lambda weight: weight, launch=reference),
    impls=(WGMMA, MMA),
    cases=cases,
    cost=cost,
)
