"""New keys and values go into the paged cache.

    k, v [T, Hk, D]: views into the fused projection, last dimension contiguous
    key_cache, value_cache [blocks, Hk, block_size, D];  slot_mapping [T] int64 = block · block_size + offset, −1: skip
    bytes: 4·T·Hk·D·itemsize
No slot occurs twice.
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
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    if slot_mapping.numel() and int(slot_mapping.amin()) < 0:
        used = slot_mapping >= 0
        k, v, slot_mapping = k[used], v[used], slot_mapping[used]
    block_size = key_cache.shape[2]
    at = (slot_mapping // block_size, slot_mapping % block_size)
    key_cache.transpose(1, 2).index_put_(at, k.to(key_cache.dtype))
    value_cache.transpose(1, 2).index_put_(at, v.to(value_cache.dtype))


@dataclass(frozen=True)
class Case:
    tokens: int
    kv_heads: int
    head_dim: int
    block_size: int

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        blocks = 2 + 2 * self.tokens // self.block_size
        slots = torch.randperm(blocks * self.block_size, generator=generator, device=device)[: self.tokens]
        slots[self.tokens // 2 :: 5] = -1  # padding
        k, v = normal(self.tokens, 2 * self.kv_heads, self.head_dim).chunk(2, dim=1)
        cache = (blocks, self.kv_heads, self.block_size, self.head_dim)
        return {"k": k, "v": v, "key_cache": normal(*cache), "value_cache": normal(*cache), "slot_mapping": slots}


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 2, 64, 16)
    yield Case(13, 1, 80, 16)
    yield Case(40, 3, 96, 32)
    if large:
        for tokens in (1, 64, 2048):
            yield Case(tokens, 8, 128, 16)
            yield Case(tokens, 8, 256, 64)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    return Cost(4 * case.tokens * case.kv_heads * case.head_dim * dtype.itemsize, 0)


OP = Op(
    name="kv_write",
    reference=Impl(name="reference", supports=always, launch=reference),
    impls=(
        Impl(name="triton", supports=triton.why_not, launch=triton.deferred("kv_write")),
        Impl(name="c", supports=rows.kv_write_why_not, launch=rows.kv_write),
    ),
    cases=cases,
    cost=cost,
)
