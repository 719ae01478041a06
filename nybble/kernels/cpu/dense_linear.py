"""y = x · Wᵀ with W in 16 bits, for few rows: the output layer of a decode step.

    x [M, K], W [N, K] as torch keeps it → y [M, N];   bytes: 2·N·K;   flops: 2·M·N·K

Torch's bf16 product on CPUs without bf16 arithmetic reads W at half the memory's speed for one row and takes M times
as long for M. This one reads W once for up to four rows, sums in fp32 and can hand the sums out as they are. A row's
result depends neither on the other rows nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from nybble.kernels.cpu import compiler
from nybble.kernels.cpu.compiler import INTEGER, POINTER, TYPES
from nybble.kernels.op import Spec

VECTOR = 16  # K is a whole number of vectors on any machine


@functools.cache
def function() -> ctypes._NamedFuncPointer:
    function = compiler.library().dense_linear
    function.argtypes = [POINTER] * 4 + [INTEGER] * 5 + [POINTER, INTEGER]
    function.restype = None
    return function


def why_not(spec: Spec) -> str | None:
    """`spec.sizes` holds in_features."""
    if spec.device.type != "cpu":
        return "the C kernel runs on CPUs"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"weights are fp16 or bf16, not {spec.dtype}"
    if spec.sizes["in_features"] % VECTOR:
        return f"in_features must be a multiple of {VECTOR}, not {spec.sizes['in_features']}"
    return compiler.why_not()


def launch(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """[M, K] · [N, K] → [M, N] in `out_dtype` (default: x's)."""
    (rows, k), n = x.shape, weight.shape[0]
    assert weight.shape == (n, k), (x.shape, weight.shape)
    assert weight.dtype == x.dtype, (x.dtype, weight.dtype)
    assert weight.is_contiguous(), weight.stride()
    x = x.contiguous()
    y = torch.empty((rows, n), dtype=out_dtype or x.dtype)
    scratch = torch.empty(rows * k)
    function()(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        scratch.data_ptr(),
        rows,
        k,
        n,
        TYPES[x.dtype],
        TYPES[y.dtype],
        compiler.thread_pool(),
        torch.get_num_threads(),
    )
    return y
