"""Norm, activation, rotation and cache write on CPUs in C: one pass each, where torch makes several."""

from __future__ import annotations

import ctypes
import functools

import torch

from nybble.kernels.cpu import compiler
from nybble.kernels.cpu.compiler import INTEGER, POINTER, TYPES
from nybble.kernels.op import Spec

STEP = 16  # whole vectors on every machine

ARGUMENTS = {
    "rms_norm": [POINTER] * 5 + [INTEGER] * 3 + [ctypes.c_double, INTEGER],
    "silu_mul": [POINTER] * 2 + [INTEGER] * 3,
    "rotary": [POINTER] * 4 + [INTEGER] * 8,
    "kv_write": [POINTER] * 5 + [INTEGER] * 6,
}


@functools.cache
def function(name: str) -> ctypes._NamedFuncPointer:
    found = getattr(compiler.library(), name)
    found.argtypes = [*ARGUMENTS[name], POINTER, INTEGER]
    found.restype = None
    return found


def call(name: str, *arguments: int | float | None) -> None:
    function(name)(*arguments, compiler.thread_pool(), torch.get_num_threads())


def _why_not(spec: Spec, size: int, name: str) -> str | None:
    if spec.device.type != "cpu":
        return "the C kernel runs on CPUs"
    if spec.dtype not in TYPES:
        return f"computes in fp16, bf16 or fp32, not {spec.dtype}"
    if size % STEP:
        return f"{name} must be a multiple of {STEP}, not {size}"
    return compiler.why_not()


def rms_norm_why_not(spec: Spec) -> str | None:
    return _why_not(spec, spec.sizes["hidden"], "hidden")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.stride(1) == 1, x.stride()
    assert residual is None or residual.is_contiguous(), residual.stride()
    rows, size = x.shape
    y = torch.empty((rows, size), dtype=x.dtype)
    total = x if residual is None else torch.empty_like(y)
    pointers = (x.data_ptr(), weight.data_ptr(), None if residual is None else residual.data_ptr(), y.data_ptr())
    call("rms_norm", *pointers, total.data_ptr(), rows, x.stride(0), size, eps, TYPES[x.dtype])
    return y, total


def silu_mul_why_not(spec: Spec) -> str | None:
    return _why_not(spec, spec.sizes["intermediate"], "intermediate")


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    assert gate_up.is_contiguous(), gate_up.stride()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, size), dtype=gate_up.dtype)
    call("silu_mul", gate_up.data_ptr(), y.data_ptr(), rows, size, TYPES[gate_up.dtype])
    return y


def rotary_why_not(spec: Spec) -> str | None:
    return _why_not(spec, spec.sizes["rotary_dim"] // 2, "half of rotary_dim")


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    tokens, q_heads, head_dim = q.shape
    assert q.stride()[1:] == k.stride()[1:] == (head_dim, 1), (q.stride(), k.stride())
    assert positions.dtype == torch.int64, positions.dtype
    assert positions.is_contiguous(), positions.stride()
    assert cos_sin.dtype == torch.float32, cos_sin.dtype
    assert cos_sin.is_contiguous(), cos_sin.stride()
    pointers = (q.data_ptr(), k.data_ptr(), positions.data_ptr(), cos_sin.data_ptr())
    sizes = (tokens, q.stride(0), k.stride(0), q_heads, k.shape[1], head_dim, cos_sin.shape[1] // 2)
    call("rotary", *pointers, *sizes, TYPES[q.dtype])


def kv_write_why_not(spec: Spec) -> str | None:
    return _why_not(spec, 0, "")  # bytes are copied: any size will do


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    tokens, heads, head_dim = k.shape
    size = k.element_size()
    assert k.dtype == v.dtype == key_cache.dtype == value_cache.dtype, (k.dtype, key_cache.dtype)
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1), (k.stride(), v.stride())
    assert key_cache.is_contiguous(), key_cache.stride()
    assert value_cache.is_contiguous(), value_cache.stride()
    assert slot_mapping.dtype == torch.int64, slot_mapping.dtype
    assert slot_mapping.is_contiguous(), slot_mapping.stride()
    tensors = (k, v, key_cache, value_cache, slot_mapping)
    strides = (k.stride(0) * size, v.stride(0) * size)
    pointers = (tensor.data_ptr() for tensor in tensors)
    call("kv_write", *pointers, tokens, *strides, heads, head_dim * size, key_cache.shape[2])
