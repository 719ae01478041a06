"""4-bit linear in Triton. Meaning and shapes: `nybble.kernels.int4_linear`.

Layout: K is cut into blocks of 128 = 8 nibbles × 16 rows. `words` is int32 [K/128 · 16, N]; nibble j of word (b, i, n)
holds k = 128·b + 16·j + i. So one shift of a [16, BLOCK_N] tile of words gives sixteen consecutive k, loads run along
N, and nothing is shuffled between threads. 16 divides every group, so a nibble has one scale.

A nibble becomes a float without a conversion: its bits, or-ed into the mantissa of 2^10 (fp16) or 2^7 (bf16), give
magic + code, from which magic + zero is subtracted, exactly. The scale multiplies a group's fp32 sum.

    M < DEQUANTIZE_FROM   one kernel; K split so that the grid fills the chip, parts summed in order by a second kernel
    above                 W is written once in 16 bit and cuBLAS multiplies: its tiles are better than ours
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.triton.attention import processors

BLOCK_K = 128
DEQUANTIZE_FROM = 192  # tokens


@dataclass(frozen=True)
class Packed:
    words: torch.Tensor  # int32 [blocks · 16, N]
    scales: torch.Tensor  # [groups, N], zero past K
    zeros: torch.Tensor  # uint8 [groups, N]
    group_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[1]


def prepare(weight: Int4Weight) -> Packed:
    n, k = weight.out_features, weight.in_features
    blocks = triton.cdiv(k, BLOCK_K)
    codes = torch.nn.functional.pad(weight.codes(), (0, blocks * BLOCK_K - k)).view(n, blocks, 8, 16)
    words = torch.zeros((blocks, 16, n), dtype=torch.int32, device=codes.device)
    for j in range(8):
        words |= codes[:, :, j].permute(1, 2, 0).int() << 4 * j
    padding = (0, 0, 0, triton.cdiv(blocks * BLOCK_K, weight.group_size) - weight.scales.shape[0])
    scales = torch.nn.functional.pad(weight.scales, padding).contiguous()
    zeros = torch.nn.functional.pad(weight.zeros, padding).contiguous()
    return Packed(words.view(blocks * 16, n), scales, zeros, weight.group_size, k)


@triton.jit
def centered(words, zero, j: tl.constexpr, dtype: tl.constexpr):
    """Nibble j of each word minus `zero` (a row of codes), exactly, as `dtype`."""
    code = (words >> (4 * j)) & 0xF
    if dtype == tl.float16:
        return (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (zero.to(tl.float16) + 1024.0)[None, :]
    elif dtype == tl.bfloat16:
        return (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (zero.to(tl.bfloat16) + 128.0)[None, :]
    else:
        return code.to(tl.float32) - zero.to(tl.float32)[None, :]


@triton.jit
def int4_linear_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,  # [M, N], or the fp32 parts [SPLITS, M, N]
    M,
    N,
    K,
    x_stride,
    blocks,
    blocks_per_split,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Nibbles (16 k each) that share a scale within a block.
    SHARED: tl.constexpr = GROUP_SIZE // 16 if GROUP_SIZE < 128 else 8
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, 16)
    inside_n = n < N
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride + i[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        word_row = (block * 16 + i).to(tl.int64)[:, None] * N
        words = tl.load(words_ptr + word_row + n[None, :], mask=inside_n[None, :], other=0)
        for share in tl.static_range(8 // SHARED):
            group = (block * 128 + share * SHARED * 16) // GROUP_SIZE
            at = group.to(tl.int64) * N + n
            scale = tl.load(scales_ptr + at, mask=inside_n, other=0.0).to(tl.float32)
            zero = tl.load(zeros_ptr + at, mask=inside_n, other=0)
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(SHARED):
                k = block * 128 + (share * SHARED + s) * 16
                inside = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k + i < K)[None, :]
                x = tl.load(x_row + k, mask=inside, other=0.0)
                w = centered(words, zero, share * SHARED + s, dtype)
                part = tl.dot(x, w, part, input_precision="ieee")
            acc += part * scale[None, :]
    inside = (m < M)[:, None] & inside_n[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLITS > 1:
        tl.store(y_ptr + split.to(tl.int64) * M * N + at, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + at, acc.to(dtype), mask=inside)


@triton.jit
def sum_parts_kernel(
    parts_ptr, bias_ptr, y_ptr, elements, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = Σ parts + bias, in the order of the splits: the same sum every time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * elements.to(tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    w_ptr,  # [K, N]
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, 16)
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    inside_n = n < N
    words = tl.load(
        words_ptr + (block * 16 + i).to(tl.int64)[:, None] * N + n[None, :], mask=inside_n[None, :], other=0
    )
    for j in tl.static_range(8):
        at = ((block * 128 + j * 16) // GROUP_SIZE).to(tl.int64) * N + n
        scale = tl.load(scales_ptr + at, mask=inside_n, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + at, mask=inside_n, other=0)
        k = block * 128 + j * 16 + i
        w = centered(words, zero, j, dtype).to(tl.float32) * scale[None, :]
        inside = (k < K)[:, None] & inside_n[None, :]
        tl.store(w_ptr + k.to(tl.int64)[:, None] * N + n[None, :], w.to(dtype), mask=inside)


def launch(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    assert x.dim() == 2, x.shape
    assert x.stride(1) == 1, x.stride()
    if x.shape[0] >= DEQUANTIZE_FROM:
        w = dequantize(weight, x.dtype)
        return torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    return multiply(x, weight, bias)


def dequantize(weight: Packed, dtype: torch.dtype) -> torch.Tensor:
    """W transposed: [K, N]."""
    k, n = weight.in_features, weight.out_features
    w = torch.empty((k, n), dtype=dtype, device=weight.words.device)
    grid = (triton.cdiv(n, 256), triton.cdiv(k, BLOCK_K))
    dequantize_kernel[grid](
        weight.words, weight.scales, weight.zeros, w, n, k, GROUP_SIZE=weight.group_size, BLOCK_N=256
    )
    return w


def multiply(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    m, n, k = x.shape[0], weight.out_features, weight.in_features
    block_m, block_n, num_warps = tile(m)
    num_stages = 2 if x.dtype == torch.float32 else 4  # what 99 KB of shared memory hold
    blocks = triton.cdiv(k, BLOCK_K)
    tiles = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    splits = max(1, min(4 * processors(x.device) // tiles, blocks // 2))
    blocks_per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = torch.empty((splits, m, n), dtype=torch.float32, device=x.device) if splits > 1 else y
    int4_linear_kernel[(triton.cdiv(n, block_n), triton.cdiv(m, block_m), splits)](
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        bias,
        parts,
        m,
        n,
        k,
        x.stride(0),
        blocks,
        blocks_per_split,
        GROUP_SIZE=weight.group_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        EVEN_K=k % BLOCK_K == 0,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if splits > 1:
        sum_parts_kernel[(triton.cdiv(m * n, 1024),)](
            parts, bias, y, m * n, n, SPLITS=splits, HAS_BIAS=bias is not None, BLOCK=1024
        )
    return y


def tile(tokens: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps for this many tokens."""
    if tokens <= 16:
        return 16, 128, 4
    if tokens <= 32:
        return 32, 128, 4
    return 64, 128, 4
