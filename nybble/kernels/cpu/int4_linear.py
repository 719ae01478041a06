"""4-bit linear on CPUs. Meaning and shapes: `nybble.kernels.int4_linear`.

c      our C kernel: any dtype, exact in fp32, for any number of rows; needs a C compiler on the machine. A row's
       result depends neither on the other rows nor on the number of threads
torch  torch's packed product: bf16 on x86 with AVX2 or newer; no compiler. It keeps a zero point as
       (8 − zero) · scale rounded to bf16, so each weight of a group may be off by 2⁻⁹ · |8 − zero| · scale
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from nybble.kernels.cpu import compiler
from nybble.kernels.cpu.compiler import INTEGER, POINTER, TYPES
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Spec

TILE = 32  # columns of a C tile: a constant of int4_linear.c
C_GROUPS = 32  # a group is a whole number of vectors and of words
TORCH_GROUPS = (32, 64, 128, 256)
TORCH_CHUNK = 4096  # output rows packed at once: torch wants an int32 for each code


class WeightStruct(ctypes.Structure):
    """`struct weight` of int4_linear.c."""

    _fields_ = (
        *((name, POINTER) for name in ("words", "scales", "zeros")),
        *((name, INTEGER) for name in ("in_features", "out_features", "group_size", "scale_type")),
    )


@dataclass(frozen=True)
class Tiled:
    words: torch.Tensor  # int32 [N / 32, K / 8, 32]: eight consecutive k of one column; missing columns have scale 0
    scales: torch.Tensor  # [N / 32, K / g, 32] in their own type
    zeros: torch.Tensor  # uint8, the same
    struct: WeightStruct  # points into these


@functools.cache
def c_function() -> ctypes._NamedFuncPointer:
    function = compiler.library().int4_linear
    function.argtypes = [POINTER] * 5 + [INTEGER] * 2 + [POINTER, INTEGER]
    function.restype = None
    return function


def c_why_not(spec: Spec) -> str | None:
    if spec.device.type != "cpu":
        return "the C kernel runs on CPUs"
    if spec.dtype not in TYPES:
        return f"computes in fp16, bf16 or fp32, not {spec.dtype}"
    if spec.sizes["group_size"] % C_GROUPS:
        return f"groups must be a multiple of {C_GROUPS}, not {spec.sizes['group_size']}"
    return compiler.why_not()


def c_prepare(weight: Int4Weight) -> Tiled:
    n, k = weight.out_features, weight.in_features
    tiles = -(-n // TILE)

    def tiled(x: torch.Tensor) -> torch.Tensor:
        """[rows, N] → [tiles, rows, 32], the missing columns zero."""
        padded = torch.nn.functional.pad(x, (0, tiles * TILE - n))
        return padded.view(x.shape[0], tiles, TILE).transpose(0, 1).contiguous()

    # Four bytes of qweight are eight consecutive k, the lowest nibble first: exactly a word.
    words = tiled(weight.qweight.contiguous().view(torch.int32).T)
    scales, zeros = tiled(weight.scales), tiled(weight.zeros)
    pointers = (words.data_ptr(), scales.data_ptr(), zeros.data_ptr())
    return Tiled(words, scales, zeros, WeightStruct(*pointers, k, n, weight.group_size, TYPES[scales.dtype]))


def c_launch(x: torch.Tensor, weight: Tiled, bias: torch.Tensor | None) -> torch.Tensor:
    struct = weight.struct
    rows, k = x.shape
    assert k == struct.in_features, (x.shape, struct.in_features)
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((rows, struct.out_features), dtype=x.dtype)
    scratch = torch.empty(rows * (k + k // struct.group_size))
    c_function()(
        ctypes.addressof(struct),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        scratch.data_ptr(),
        rows,
        TYPES[x.dtype],
        compiler.thread_pool(),
        torch.get_num_threads(),
    )
    return y


@dataclass(frozen=True)
class TorchPacked:
    words: torch.Tensor  # uint8 [N, K / 2] in torch's own order
    scales_and_zeros: torch.Tensor  # bf16 [K / g, N, 2]: scale, (8 − zero) · scale
    group_size: int


def torch_why_not(spec: Spec) -> str | None:
    if spec.device.type != "cpu" or spec.dtype != torch.bfloat16:
        return "torch's int4 product is fast on CPUs in bf16 only"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "torch's int4 product needs AVX2 or AVX512"
    if spec.sizes["group_size"] not in TORCH_GROUPS or spec.sizes["out_features"] % 16:
        return f"torch's int4 product takes groups of {TORCH_GROUPS} and multiples of 16 outputs"
    return None


def torch_prepare(weight: Int4Weight) -> TorchPacked:
    words = torch.empty_like(weight.qweight)
    # Torch packs blocks of up to 64 outputs on their own, so chunks of a multiple of 64 can be packed one by one.
    for first in range(0, weight.out_features, TORCH_CHUNK):
        rows = slice(first, first + TORCH_CHUNK)
        part = Int4Weight(weight.qweight[rows], weight.scales[:, rows], weight.zeros[:, rows], weight.group_size)
        words[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.codes().int(), 1)
    zeros = ((8 - weight.zeros.float()) * weight.scales.float()).to(torch.bfloat16)
    return TorchPacked(words, torch.stack((weight.scales.bfloat16(), zeros), dim=-1), weight.group_size)


def torch_launch(x: torch.Tensor, weight: TorchPacked, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.words, weight.group_size, weight.scales_and_zeros
    )
    return y if bias is None else y.add_(bias)
