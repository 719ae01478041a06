"""Rotary embedding in place in Triton, q and k in one launch. Formula: `nybble.kernels.rotary`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton import overlap


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    overlap.begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    is_q = block < q_blocks
    heads = tl.where(is_q, Q_HEADS, K_HEADS)
    head_stride = tl.where(is_q, q_head_stride, k_head_stride)
    if is_q:  # noqa: SIM108 — Triton's ternary takes no pointers
        base = q_ptr + token * q_token_stride
    else:
        base = k_ptr + token * k_token_stride
    head = tl.where(is_q, block, block - q_blocks) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < heads) & (i < HALF)
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + i
    cos = tl.load(angle_ptr, mask=i < HALF, other=0.0)
    sin = tl.load(angle_ptr + HALF, mask=i < HALF, other=0.0)
    a_ptr = base + head * head_stride + i
    a = tl.load(a_ptr, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(a_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(a_ptr, (a * cos - b * sin).to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(a_ptr + HALF, (b * cos + a * sin).to(q_ptr.dtype.element_ty), mask=inside)


def launch(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    assert q.stride(2) == k.stride(2) == 1, (q.stride(), k.stride())
    assert cos_sin.is_contiguous(), cos_sin.stride()
    tokens, q_heads, _ = q.shape
    k_heads, half = k.shape[1], cos_sin.shape[1] // 2
    block_half = triton.next_power_of_2(half)
    heads = max(1, 512 // block_half)
    rotary_kernel[(tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
        q,
        k,
        positions,
        cos_sin,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        HALF=half,
        HEADS=heads,
        BLOCK_HALF=block_half,
        **overlap.options(q.device),
    )
