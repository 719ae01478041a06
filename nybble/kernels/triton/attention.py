"""Paged attention in Triton. Meaning and shapes: `nybble.kernels.attention`.

Each sequence of a mixed batch belongs to one of two kernels; the other one leaves at once:
    prefill   more than one new token. A program owns a tile of (token, head of one KV group) rows and walks the keys.
    decode    one new token. The heads of one KV group make the tile, the keys are split evenly among programs by the
              sequence's *actual* length, so a graph captured for the longest context wastes nothing on a short one;
              a second kernel joins the parts in a fixed order.
Softmax runs online in base 2: m is the running maximum, total the running sum, acc the weighted values, all in fp32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nybble.kernels.triton import overlap

LOG2_E = 1.4426950408889634


@triton.jit
def attend_block(
    q,
    m,
    total,
    acc,
    first,
    end,
    positions,
    key_cache_ptr,
    value_cache_ptr,
    table_ptr,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fold keys first … min(first + BLOCK_N, end) − 1 into the softmax state of the rows at `positions`."""
    n = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    exists = n < end
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    start = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE) * D
    # Values that were never written may be NaN: they must be masked here, 0 · NaN would not vanish below.
    inside = exists[:, None] & (d < D)[None, :]
    k = tl.load(key_cache_ptr + start[:, None] + d[None, :], mask=inside, other=0.0)
    v = tl.load(value_cache_ptr + start[:, None] + d[None, :], mask=inside, other=0.0)
    seen = exists[None, :] & (n[None, :] <= positions[:, None])
    if WINDOW > 0:
        seen &= n[None, :] > positions[:, None] - WINDOW
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, axis=1))
    # A row that has seen no key yet keeps m = −inf; −inf − −inf would be NaN.
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(scores - safe_m[:, None])
    shrink = tl.exp2(m - safe_m)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_m, total, acc


@triton.jit(do_not_specialize=["table_stride"])  # it varies with the longest sequence
def prefill_kernel(
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    query_start_ptr,
    output_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    scale,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # rows past TOKENS · GROUP idle
    sequence = tl.program_id(2)
    kv_head = tl.program_id(1)
    begin = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - begin
    first_token = tl.program_id(0) * TOKENS
    if query_len > 1 and first_token < query_len:
        seq_len = tl.load(seq_lens_ptr + sequence)
        row = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        token = first_token + row // GROUP
        head = kv_head * GROUP + row % GROUP
        inside = ((row < TOKENS * GROUP) & (token < query_len))[:, None] & (d < D)[None, :]
        index = (begin + token).to(tl.int64)
        q_row = q_ptr + index * q_token_stride + head * q_head_stride
        q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0)

        offset = seq_len - query_len
        positions = offset + token
        end = tl.minimum(offset + first_token + TOKENS, seq_len)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(offset + first_token - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(first, end, BLOCK_N):
            m, total, acc = attend_block(
                q,
                m,
                total,
                acc,
                n,
                end,
                positions,
                key_cache_ptr,
                value_cache_ptr,
                block_tables_ptr + sequence.to(tl.int64) * table_stride,
                kv_head,
                scale,
                KV_HEADS,
                D,
                BLOCK_D,
                BLOCK_SIZE,
                WINDOW,
                BLOCK_N,
            )
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        o_row = output_ptr + (index * Q_HEADS + head) * D
        tl.store(o_row[:, None] + d[None, :], acc.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def split_range(seq_len, split, SPLITS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of one split, [begin, end), and how many splits have any: whole BLOCK_N tiles, evenly."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    tiles = (seq_len - first + BLOCK_N - 1) // BLOCK_N
    tiles_per_split = (tiles + SPLITS - 1) // SPLITS
    length = tl.maximum(tiles_per_split, 1) * BLOCK_N
    begin = first + split * length
    return begin, tl.minimum(begin + length, seq_len), (seq_len - first + length - 1) // length


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    query_start_ptr,
    output_ptr,
    part_ptr,  # fp32 [R, Hq, SPLITS, D]: acc / total of each split; unused when SPLITS is 1
    part_lse_ptr,  # fp32 [R, Hq, SPLITS]: m + log2(total)
    q_token_stride,
    q_head_stride,
    table_stride,
    scale,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    overlap.begin(OVERLAP)
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    sequence = tl.program_id(2)
    kv_head = tl.program_id(1)
    split = tl.program_id(0)
    seq_len = tl.load(seq_lens_ptr + sequence)
    index = tl.load(query_start_ptr + sequence)
    query_len = tl.load(query_start_ptr + sequence + 1) - index
    begin, end, _ = split_range(seq_len, split, SPLITS, WINDOW, BLOCK_N)
    # Split 0 always runs: it writes the zeros of padding rows.
    if query_len == 1 and (begin < end or split == 0):
        row = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        head = kv_head * GROUP + row
        inside = (row < GROUP)[:, None] & (d < D)[None, :]
        q_row = q_ptr + index.to(tl.int64) * q_token_stride + head * q_head_stride
        q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0)
        positions = tl.zeros([BLOCK_M], tl.int32) + (seq_len - 1)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(begin, end, BLOCK_N):
            m, total, acc = attend_block(
                q,
                m,
                total,
                acc,
                n,
                end,
                positions,
                key_cache_ptr,
                value_cache_ptr,
                block_tables_ptr + sequence.to(tl.int64) * table_stride,
                kv_head,
                scale,
                KV_HEADS,
                D,
                BLOCK_D,
                BLOCK_SIZE,
                WINDOW,
                BLOCK_N,
            )
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        if SPLITS == 1:
            o_row = output_ptr + (index.to(tl.int64) * Q_HEADS + head) * D
            tl.store(o_row[:, None] + d[None, :], acc.to(output_ptr.dtype.element_ty), mask=inside)
        else:
            part = (sequence.to(tl.int64) * Q_HEADS + head) * SPLITS + split
            tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=inside)
            tl.store(part_lse_ptr + part, m + tl.log2(total), mask=row < GROUP)


@triton.jit
def join_kernel(
    part_ptr,
    part_lse_ptr,
    seq_lens_ptr,
    query_start_ptr,
    output_ptr,
    Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One output row from its splits: Σ 2^(lse_i − max) part_i / Σ 2^(lse_i − max)."""
    overlap.begin(OVERLAP)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + sequence)
    index = tl.load(query_start_ptr + sequence).to(tl.int64)
    query_len = tl.load(query_start_ptr + sequence + 1) - index
    if query_len == 1:
        _, _, used = split_range(seq_len, 0, SPLITS, WINDOW, BLOCK_N)
        split = tl.arange(0, BLOCK_SPLITS)
        d = tl.arange(0, BLOCK_D)
        part = (sequence.to(tl.int64) * Q_HEADS + head) * SPLITS + split
        lse = tl.load(part_lse_ptr + part, mask=split < used, other=float("-inf"))
        top = tl.max(lse, axis=0)
        weight = tl.exp2(lse - tl.where(seq_len > 0, top, 0.0))
        inside = (split < used)[:, None] & (d < D)[None, :]
        values = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=inside, other=0.0)
        total = tl.sum(weight, axis=0)
        o = tl.sum(values * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
        tl.store(output_ptr + (index * Q_HEADS + head) * D + d, o.to(output_ptr.dtype.element_ty), mask=d < D)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def count_splits(rows: int, kv_heads: int, max_keys: int, block_n: int, device: torch.device) -> int:
    """As many decode programs as run at once, two on a multiprocessor, but none with less than two tiles of keys."""
    wanted = 2 * processors(device) // (rows * kv_heads)
    return max(1, min(wanted, max_keys // (2 * block_n), 64))


def prefill_tile(row_bytes: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps for heads of so many bytes: what 99 KB of shared memory (sm_86, sm_89) hold."""
    if row_bytes <= 256:  # heads of 128 in 16 bit
        return 128, 64, 8
    if row_bytes <= 512:
        return 64, 32, 4
    return 32, 16, 4


def prefill(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    output: torch.Tensor,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
) -> None:
    """Fill the rows of `output` that belong to sequences of more than one new token.

    Launched the ordinary way, without overlap: what comes next relies on it, see `HostStep.size`.
    """
    head_dim, kv_heads = q.shape[2], key_cache.shape[1]
    group, block_d = q.shape[1] // kv_heads, triton.next_power_of_2(head_dim)
    block_m, block_n, num_warps = prefill_tile(block_d * q.element_size())
    block_m = max(block_m, triton.next_power_of_2(group))
    prefill_kernel[(triton.cdiv(max_query_len, block_m // group), kv_heads, seq_lens.shape[0])](
        *(q, key_cache, value_cache, block_tables, seq_lens, query_start, output),
        *(q.stride(0), q.stride(1), block_tables.stride(0), scale * LOG2_E),
        Q_HEADS=q.shape[1],
        KV_HEADS=kv_heads,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=key_cache.shape[2],
        WINDOW=sliding_window or 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=2,
    )


def launch(
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
    assert q.stride(2) == block_tables.stride(1) == 1, (q.stride(), block_tables.stride())
    assert key_cache.is_contiguous(), key_cache.stride()
    assert value_cache.is_contiguous(), value_cache.stride()
    tokens, q_heads, head_dim = q.shape
    kv_heads, block_size = key_cache.shape[1:3]
    rows, group = seq_lens.shape[0], q_heads // kv_heads
    block_d = triton.next_power_of_2(head_dim)
    row_bytes = block_d * q.element_size()
    window = sliding_window or 0
    output = torch.empty((tokens, q_heads, head_dim), dtype=q.dtype, device=q.device)
    strides = (q.stride(0), q.stride(1), block_tables.stride(0), scale * LOG2_E)
    inputs = (q, key_cache, value_cache, block_tables, seq_lens, query_start, output)
    shape = {"D": head_dim, "BLOCK_D": block_d, "WINDOW": window}
    heads = {"Q_HEADS": q_heads, "KV_HEADS": kv_heads, "BLOCK_SIZE": block_size}

    if max_query_len > 1:
        prefill(*inputs, max_query_len, scale, sliding_window)
    if min_query_len > 1:
        return output

    block_n = 32 if row_bytes > 256 else 64
    max_keys = min(max_seq_len, window) if window else max_seq_len
    splits = count_splits(rows, kv_heads, max_keys, block_n, q.device)
    if max_query_len > 1:
        # Steps come in all lengths, and few kernels should serve them. (Graphs bring theirs, for decode alone.)
        splits = 1 << splits.bit_length() - 1
    part = torch.empty((rows, q_heads, splits, head_dim if splits > 1 else 0), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((rows, q_heads, splits), dtype=torch.float32, device=q.device)
    decode_kernel[(splits, kv_heads, rows)](
        *inputs,
        part,
        part_lse,
        *strides,
        **heads,
        **shape,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=block_n,
        SPLITS=splits,
        num_warps=4,
        num_stages=3,
        **overlap.options(q.device),
    )
    if splits > 1:
        join_kernel[(rows, q_heads)](
            part,
            part_lse,
            seq_lens,
            query_start,
            output,
            Q_HEADS=q_heads,
            **shape,
            BLOCK_N=block_n,
            SPLITS=splits,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            num_warps=2,
            **overlap.options(q.device),
        )
    return output
