"""4-bit linear on CPUs. Meaning and shapes: `nybble.kernels.int4_linear`.

    c      our C kernel: any dtype, exact in fp32, for 1 to thousands of rows; needs a C compiler on the machine
    torch  torch's packed product: bf16 on x86 with AVX2 or newer; no compiler. It keeps a zero point as
           (8 − zero) · scale rounded to bf16, so each weight of a group may be off by 2⁻⁹ · |8 − zero| · scale
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

import torch

from nybble.kernels.cpu.compiler import BuildError, library
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Spec

TILE = 32  # columns of a C tile; with FEW_ROWS and MAX_GROUP a constant of int4_linear.c
FEW_ROWS = 4
MAX_GROUP = 256
TORCH_GROUPS = (32, 64, 128, 256)
TORCH_CHUNK = 4096  # output rows packed at once: torch wants an int32 for each code


@dataclass(frozen=True)
class Tiled:
    words: torch.Tensor  # int32 [N / 32, K / 8, 32]: eight consecutive k of one column
    scales: torch.Tensor  # fp32 [N / 32, K / g, 32]
    zeros: torch.Tensor  # fp32, the same
    shift: torch.Tensor  # fp32 [K]: 16^−(k mod 8), but 1 where k mod 8 is 7
    group_size: int
    out_features: int


@functools.cache
def c_function() -> ctypes._NamedFuncPointer:
    function = library("int4_linear.c").int4_linear
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4 + [ctypes.c_int]
    function.restype = None
    return function


def c_why_not(spec: Spec) -> str | None:
    group_size = spec.sizes["group_size"]
    if spec.device.type != "cpu" or not sys.platform.startswith("linux") or sys.byteorder != "little":
        return "the C kernel is for little-endian CPUs under Linux"
    if group_size % 8 or group_size > MAX_GROUP:
        return f"groups must be a multiple of 8 up to {MAX_GROUP}, not {group_size}"
    try:
        c_function()
    except BuildError as error:
        return str(error)
    return None


def c_prepare(weight: Int4Weight) -> Tiled:
    n, k = weight.out_features, weight.in_features
    tiles = -(-n // TILE)

    def tiled(x: torch.Tensor) -> torch.Tensor:
        """[rows, N] → [tiles, rows, 32], the missing columns zero."""
        padded = torch.nn.functional.pad(x, (0, tiles * TILE - n))
        return padded.view(x.shape[0], tiles, TILE).transpose(0, 1).contiguous()

    # Four bytes of qweight are eight consecutive k, the lowest nibble first: exactly a word.
    words = weight.qweight.contiguous().view(torch.int32).T
    shift = torch.tensor([16.0**-s for s in range(7)] + [1.0]).repeat(k // 8)
    scales, zeros = tiled(weight.scales.float()), tiled(weight.zeros.float())
    return Tiled(tiled(words), scales, zeros, shift, weight.group_size, n)


def c_launch(x: torch.Tensor, weight: Tiled, bias: torch.Tensor | None) -> torch.Tensor:
    rows, k = x.shape
    assert k == weight.shift.shape[0], (x.shape, weight.shift.shape)
    wide = x.float().contiguous()
    shifted = wide * weight.shift if rows <= FEW_ROWS else wide
    tiles = weight.words.shape[0]
    y = torch.empty((rows, tiles * TILE))
    c_function()(
        wide.data_ptr(),
        shifted.data_ptr(),
        weight.words.data_ptr(),
        weight.scales.data_ptr(),
        weight.zeros.data_ptr(),
        y.data_ptr(),
        rows,
        k,
        tiles,
        weight.group_size,
        torch.get_num_threads(),
    )
    y = y[:, : weight.out_features]
    return (y if bias is None else y.add_(bias)).to(x.dtype)


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
