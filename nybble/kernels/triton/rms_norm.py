"""RMS norm in Triton: one read of x and residual, one write of each result. Formula: `nybble.kernels.rms_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton import overlap


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    sum_ptr,
    rows,
    x_stride,
    eps,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    overlap.begin(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_H)[None, :]
    inside = (row < rows) & (column < H)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(x.dtype)
        tl.store(sum_ptr + row * H + column, total, mask=inside)
        wide = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / H + eps)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + column, (wide * inverse[:, None] * weight).to(x.dtype), mask=inside)


def launch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.dim() == 2, x.shape
    assert x.stride(1) == 1, x.stride()
    assert residual is None or residual.is_contiguous(), residual.stride()
    rows, hidden = x.shape
    y = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    block = triton.next_power_of_2(hidden)
    rows_per_program = max(1, 1024 // block)
    rms_norm_kernel[(triton.cdiv(rows, rows_per_program),)](
        x,
        weight,
        residual,
        y,
        total,
        rows,
        x.stride(0),
        eps,
        H=hidden,
        ROWS=rows_per_program,
        BLOCK_H=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=max(4, min(16, block // 512)),
        **overlap.options(x.device),
    )
    return y, total
