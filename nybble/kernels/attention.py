"""Causal attention over the paged cache: prefill, chunks of it and decode in one call.

    q [T, Hq, D], T tokens of R sequences back to back; sequence r owns rows query_start[r] … query_start[r+1] − 1
    key_cache, value_cache [blocks, Hk, block_size, D], new keys and values already written; Hq = Hk · group
    block_tables [R, max_blocks] int32; seq_lens [R] int32; query_start [R+1] int32 → o [T, Hq, D]

    The last query of a sequence sits at position seq_len − 1, the ones before it right before. A query at position p
    sees keys j with max(0, p − sliding_window + 1) ≤ j ≤ p:  o = Σ_j softmax_j(scale · q·k_j) v_j, sums in fp32.
    Rows of a sequence with seq_len 0 (padding) give zeros. A sequence may have no row; rows behind the last sequence
    belong to none and may give anything.

    bytes: 2·Σ seq_len·Hk·D·itemsize + 2·T·Hq·D·itemsize;  flops: 4·D·Hq·(pairs of query and seen key)
min_query_len, max_query_len and max_seq_len are bounds known on the host: what to launch, and how much of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nybble.kernels import triton
from nybble.kernels.cpu import attention as cpu
from nybble.kernels.cuda import attention as cuda
from nybble.kernels.op import Cost, Impl, Op, always

QUERY_BLOCK = 128


def reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    min_query_len: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    output = torch.zeros_like(q, memory_format=torch.contiguous_format)
    block_size = key_cache.shape[2]
    starts = query_start.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if seq_len == 0 or begin == end:
            continue
        # Keys before `first` are outside every query's window.
        first = 0 if sliding_window is None else max(0, seq_len - (end - begin) + 1 - sliding_window)
        first_block = first // block_size
        blocks = block_tables[row, first_block : -(-seq_len // block_size)]
        inside = slice(first - first_block * block_size, seq_len - first_block * block_size)
        key, value = (_gather(cache, blocks)[:, inside] for cache in (key_cache, value_cache))
        _attend(q[begin:end], key, value, scale, sliding_window, output[begin:end])
    return output


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The named blocks side by side in fp32 (or wider), [Hk, positions, D]."""
    wide = torch.promote_types(cache.dtype, torch.float32)
    chosen = cache.index_select(0, blocks).transpose(0, 1)
    return chosen.to(wide, memory_format=torch.contiguous_format).flatten(1, 2)


def _attend(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    output: torch.Tensor,
) -> None:
    """q [L, Hq, D] against key and value [Hk, S, D], whose last L positions are the queries' own; fills `output`.

    In fp32: CPUs are slow in 16 bit. QUERY_BLOCK queries at a time: that bounds the score matrix and skips the
    keys that no query of a block may see.
    """
    length, (kv_heads, seen, _) = q.shape[0], key.shape
    q = q.to(key.dtype) * scale
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        last = seen - length + end  # keys before it are visible to this block
        first = 0 if sliding_window is None else max(0, last - (end - begin) + 1 - sliding_window)
        # [L, Hk · group, D] → [Hk, group · L, D]: the heads of one KV head are rows of one product.
        rows = q[begin:end].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = rows @ key[:, first:last].transpose(1, 2)
        if end - begin > 1:
            position = torch.arange(last - (end - begin), last, device=q.device).unsqueeze(1)
            j = torch.arange(first, last, device=q.device)
            hidden = j > position if sliding_window is None else (j > position) | (j <= position - sliding_window)
            scores.unflatten(1, (-1, end - begin)).masked_fill_(hidden, -torch.inf)
        out = scores.softmax(-1) @ value[:, first:last]
        output[begin:end].copy_(out.unflatten(1, (-1, end - begin)).permute(2, 0, 1, 3).flatten(1, 2))


@dataclass(frozen=True)
class Case:
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]  # 0: a padding row
    query_heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    sliding_window: int | None = None
    slack: int = 0  # how far max_seq_len lies above the longest sequence, as in a captured graph

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        block_size, rows = self.block_size, len(self.seq_lens)
        needed = [-(-length // block_size) for length in self.seq_lens]
        max_seq_len = max(self.seq_lens) + self.slack
        order = torch.randperm(sum(needed) + 1, generator=generator, device=device).int()
        # Entries past a sequence's length name the one block that belongs to nobody.
        tables = order[-1].repeat(rows, -(-max_seq_len // block_size))
        caches = [normal(len(order), self.kv_heads, block_size, self.head_dim) for _ in range(2)]
        for cache in caches:
            cache[order[-1]] = torch.nan
        taken = 0
        for row, count in enumerate(needed):
            tables[row, :count] = order[taken : taken + count]
            taken += count
            if used := self.seq_lens[row] % block_size:
                for cache in caches:
                    cache[tables[row, count - 1], :, used:] = torch.nan  # what was never written must not matter
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).int().to(device)
        heads = self.query_heads + 2 * self.kv_heads
        return {
            "q": normal(sum(self.query_lens), heads, self.head_dim)[:, : self.query_heads],
            "key_cache": caches[0],
            "value_cache": caches[1],
            "block_tables": tables,
            "seq_lens": torch.tensor(self.seq_lens, dtype=torch.int32, device=device),
            "query_start": starts,
            "min_query_len": min(self.query_lens),
            "max_query_len": max(self.query_lens),
            "max_seq_len": max_seq_len,
            "scale": self.head_dim**-0.5,
            "sliding_window": self.sliding_window,
        }


def cases(large: bool = False) -> Iterator[Case]:
    yield Case((1, 1, 1), (1, 17, 40), 4, 2, 64)
    yield Case((1, 1, 1, 1), (33, 0, 90, 0), 7, 1, 80, slack=200)
    yield Case((1, 1), (70, 5), 3, 3, 96, 32, sliding_window=20)
    yield Case((5,), (5,), 4, 1, 128)
    yield Case((9, 1, 20, 1), (30, 44, 20, 0), 6, 2, 64)
    yield Case((35, 3), (50, 61), 2, 2, 80, 32, sliding_window=13)
    yield Case((2, 1), (18, 3), 5, 1, 256, 64)
    yield Case((1, 1, 1), (16, 64, 200), 8, 1, 112, 8, sliding_window=33)
    yield Case((1, 0, 6, 0), (30, 0, 20, 0), 4, 2, 64)
    if large:
        yield from model_cases()


def model_cases() -> Iterator[Case]:
    for query_heads, kv_heads, head_dim in ((14, 2, 64), (12, 2, 128), (40, 8, 128), (64, 8, 128), (16, 8, 256)):
        lens = (1, 700, 0, 4096, 33, 129)
        yield Case((1,) * len(lens), lens, query_heads, kv_heads, head_dim, slack=8192)
        yield Case((300, 1, 1000, 129), (300, 2000, 1500, 129), query_heads, kv_heads, head_dim)
    yield Case((1,), (32000,), 40, 8, 128)
    yield Case((1,) * 64, tuple(range(500, 1140, 10)), 40, 8, 128)
    yield Case((1,) * 300, (2000, 0, 3) * 100, 8, 1, 128, slack=1)
    yield Case((1, 900, 400), (3000, 900, 2500), 32, 8, 128, sliding_window=512)
    yield Case((20, *(1,) * 119), (300, *(0, 17, 900, 64, 2000, 513, 1) * 17), 16, 2, 64, sliding_window=500)
    yield Case((1, 1), (3000, 100), 32, 8, 128, 32, sliding_window=512)
    yield Case((500, 20), (500, 1000), 32, 32, 96, 64)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    keys = pairs = 0
    for queries, length in zip(case.query_lens, case.seq_lens, strict=True):
        window = case.sliding_window or length
        spans = [min(window, position + 1) for position in range(length - queries, length)] if length else []
        pairs += sum(spans)
        keys += min(length, window + queries - 1)
    elements = 2 * keys * case.kv_heads + 2 * sum(case.query_lens) * case.query_heads
    return Cost(elements * case.head_dim * dtype.itemsize, 4 * case.head_dim * case.query_heads * pairs)


OP = Op(
    name="attention",
    reference=Impl(name="reference", supports=always, launch=reference),
    impls=(
        Impl(name="cuda", supports=cuda.supports, launch=cuda.launch),
        Impl(name="triton", supports=triton.why_not, launch=triton.deferred("attention")),
        Impl(name="c", supports=cpu.why_not, launch=cpu.launch),
    ),
    cases=cases,
    cost=cost,
)
