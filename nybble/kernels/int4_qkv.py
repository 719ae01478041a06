"""The first part of attention in one operation: project, turn queries and keys by their positions, fill the cache.

    x [T, K], W [(Hq + 2·Hk)·D, K] as an `Int4Weight`, bias [(Hq + 2·Hk)·D] or None → q [T, Hq, D], turned
    positions, slot_mapping [T] int64, cos_sin [P, D] fp32, key_cache, value_cache [blocks, Hk, block_size, D]: as in
    `rotary` (of whole heads) and `kv_write`, whose work it does;  bytes and flops: theirs and those of int4_linear

Models use it where it has an implementation besides the reference, else the three one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nybble.kernels import int4_linear, kv_write, rotary
from nybble.kernels.cuda import w4a16_wgmma
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Cost, Impl, Op, always


def reference(
    x: torch.Tensor,
    weight: Int4Weight,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    qkv = int4_linear.reference(x, weight, bias).unflatten(-1, (-1, head_dim))
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    rotary.reference(q, k, positions, cos_sin)
    kv_write.reference(k, v, key_cache, value_cache, slot_mapping)
    return q


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    q_heads: int
    kv_heads: int
    head_dim: int
    group_size: int
    has_bias: bool = False

    @property
    def layout(self) -> dict[str, int]:
        """What `prepare` wants to know besides the weight."""
        return {"head_dim": self.head_dim, "rotary_dim": self.head_dim}

    def parts(self) -> tuple[int4_linear.Case, rotary.Case, kv_write.Case]:
        heads = self.q_heads + 2 * self.kv_heads
        return (
            int4_linear.Case(
                self.tokens, self.in_features, heads * self.head_dim, self.group_size, has_bias=self.has_bias
            ),
            rotary.Case(self.tokens, self.q_heads, self.kv_heads, self.head_dim, self.head_dim),
            kv_write.Case(self.tokens, self.kv_heads, self.head_dim, block_size=16),
        )

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        linear, turn, write = (case.arguments(device, dtype, generator) for case in self.parts())
        names = ("key_cache", "value_cache", "slot_mapping")
        return linear | {name: turn[name] for name in ("positions", "cos_sin")} | {name: write[name] for name in names}


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 128, 2, 1, 64, 32)
    yield Case(3, 384, 7, 1, 64, 64, has_bias=True)
    yield Case(17, 256, 4, 2, 128, 128, has_bias=True)
    yield Case(140, 256, 3, 3, 80, 128)
    if large:
        for tokens in (1, 8, 16, 64, 200, 1000):
            yield Case(tokens, 5120, 40, 8, 128, 128, has_bias=True)
            yield Case(tokens, 896, 14, 2, 64, 128, has_bias=True)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    linear, turn, write = case.parts()
    costs = int4_linear.cost(linear, dtype), rotary.cost(turn, dtype), kv_write.cost(write, dtype)
    # Rows that are turned and written on the way are not stored and read again.
    kept = 3 * case.tokens * (case.q_heads + 2 * case.kv_heads) * case.head_dim * dtype.itemsize
    return Cost(max(sum(c.bytes for c in costs) - kept, costs[0].bytes), sum(c.flops for c in costs))


def prepare(weight: Int4Weight, *, head_dim: int, rotary_dim: int) -> Int4Weight:
    return weight


WGMMA = Impl(
    name="wgmma",
    supports=w4a16_wgmma.supports_qkv,
    prepare=w4a16_wgmma.prepare_qkv,
    launch=w4a16_wgmma.launch_qkv,
)

OP = Op(
    name="int4_qkv",
    reference=Impl(name="reference", supports=always, prepare=prepare, launch=reference),
    impls=(WGMMA,),
    cases=cases,
    cost=cost,
)
