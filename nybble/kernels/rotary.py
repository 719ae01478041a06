"""Rotary position embedding, in place, on halves (the NeoX way).

q [T, Hq, D], k [T, Hk, D]: views into the fused projection, last dimension contiguous;  R = rotary_dim ≤ D
cos_sin [P, R] fp32: row p holds cos(p·θ_i) | sin(p·θ_i), i < R/2;  positions [T] int64
(a_i, b_i) = (q_i, q_{i+R/2})  →  (a·cos − b·sin, b·cos + a·sin)      in fp32, rounded once; the rest stays
bytes: 2·T·(Hq + Hk)·R·itemsize + 4·T·R
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nybble.kernels import triton
from nybble.kernels.cpu import rows
from nybble.kernels.op import Cost, Impl, Op, always


def reference(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, R/2] each
    half = cos.shape[-1]
    for x in (q, k):
        a, b = x[..., :half], x[..., half : 2 * half]
        rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
        a.copy_(rotated_a)
        b.copy_(rotated_b)


@dataclass(frozen=True)
class Case:
    tokens: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        heads = self.query_heads + 2 * self.kv_heads
        qkv = torch.randn(self.tokens, heads, self.head_dim, generator=generator, device=device).to(dtype)
        q, k, _ = qkv.split((self.query_heads, self.kv_heads, self.kv_heads), dim=1)
        positions = torch.randint(300, (self.tokens,), generator=generator, device=device)
        inverse = 10000.0 ** (-torch.arange(self.rotary_dim // 2, device=device) * 2 / self.rotary_dim)
        angles = torch.arange(300, device=device).unsqueeze(1) * inverse
        return {"q": q, "k": k, "positions": positions, "cos_sin": torch.cat((angles.cos(), angles.sin()), -1)}


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 4, 2, 64, 64)
    yield Case(5, 7, 1, 80, 80)
    yield Case(3, 3, 3, 96, 48)
    yield Case(2, 2, 1, 128, 128)
    if large:
        for tokens in (1, 64, 2048):
            yield Case(tokens, 40, 8, 128, 128)
            yield Case(tokens, 14, 2, 64, 64)
            yield Case(tokens, 16, 8, 256, 256)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    elements = case.tokens * (case.query_heads + case.kv_heads) * case.rotary_dim
    return Cost(2 * elements * dtype.itemsize + 4 * case.tokens * case.rotary_dim, 3 * elements)


OP = Op(
    name="rotary",
    reference=Impl(name="reference", supports=always, launch=reference),
    impls=(
        Impl(name="triton", supports=triton.why_not, launch=triton.deferred("rotary")),
        Impl(name="c", supports=rows.rotary_why_not, launch=rows.rotary),
    ),
    cases=cases,
    cost=cost,
)
