"""silu(gate) · up in Triton. Formula: `nybble.kernels.silu_mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton import overlap

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, y_ptr, intermediate, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    overlap.begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < intermediate
    gate_ptr = gate_up_ptr + row * 2 * intermediate + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + intermediate, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * intermediate + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(gate_up: torch.Tensor) -> torch.Tensor:
    assert gate_up.is_contiguous(), gate_up.stride()
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((tokens, intermediate), dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(intermediate, BLOCK))
    silu_mul_kernel[grid](gate_up, y, intermediate, BLOCK=BLOCK, **overlap.options(y.device))
    return y
