"""Root-mean-square norm, with the residual addition that precedes it.

    r = x + residual (or x)                      rounded to x's dtype: it is the next residual
    y = r / sqrt(mean(r²) + eps) · weight        in fp32, rounded once

    x, residual [T, H], weight [H] → y [T, H], r [T, H];  bytes: T·H·(2 … 4)·itemsize;  flops: ~5·T·H
Also the per-head q and k norm, on [T · heads, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nybble.kernels import triton
from nybble.kernels.cpu import rows
from nybble.kernels.op import Cost, Impl, Op, always


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype), x


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    has_residual: bool = True

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        residual = normal(self.tokens, self.hidden) * 30 if self.has_residual else None
        x = normal(self.tokens, self.hidden)
        return {"x": x, "weight": normal(self.hidden), "eps": 1e-6, "residual": residual}


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 128)
    yield Case(3, 896)
    yield Case(5, 200, has_residual=False)
    yield Case(37, 64, has_residual=False)  # a per-head norm
    if large:
        for hidden in (896, 1536, 3584, 5120, 8192):
            for tokens in (1, 16, 256, 2048):
                yield Case(tokens, hidden)
        yield Case(2048 * 40, 128, has_residual=False)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    elements = case.tokens * case.hidden
    return Cost(elements * (4 if case.has_residual else 2) * dtype.itemsize, 5 * elements)


OP = Op(
    name="rms_norm",
    reference=Impl(name="reference", supports=always, launch=reference),
    impls=(
        Impl(name="triton", supports=triton.why_not, launch=triton.deferred("rms_norm")),
        Impl(name="c", supports=rows.rms_norm_why_not, launch=rows.rms_norm),
    ),
    cases=cases,
    cost=cost,
)
