"""What the CUDA int4 kernels keep of a weight: units of its bytes, laid out by the module that reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.kernels.cuda import nvrtc
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Spec

UNIT_K = 128


@dataclass(frozen=True)
class Packed:
    units: torch.Tensor  # uint8 [row units, units of K, bytes of a unit]
    in_features: int
    out_features: int
    group_size: int
    is_gated: bool = False
    half: int = 0  # rows that belong together are so far apart; 0: rows are in their own order, see `paired`
    arrivals: torch.Tensor | None = None  # int32, for w4a16.cu

    @property
    def result_features(self) -> int:
        return self.out_features // 2 if self.is_gated else self.out_features


def unit_bytes(rows: int, group_size: int) -> int:
    """Of a unit of so many rows × UNIT_K: codes, 16-bit scales, half-byte zeros."""
    groups = UNIT_K // group_size
    return rows * UNIT_K // 2 + groups * rows * 2 + groups * rows // 2


def filled(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix with zeros below and to the right, up to this shape."""
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))


def paired(weight: Int4Weight, half: int) -> Int4Weight:
    """Put rows that are `half` apart side by side: of every 2 · half rows eight lower ones, their eight upper ones, ….

    A lane of the kernels holds rows g and g + 8 of sixteen: a gate and its up row, or the two that a rotation mixes.
    """
    eights = -(-half // 8)

    def interleaved(
        tensor: torch.Tensor,
    ) -> torch.Tensor:  # [blocks · 2 · half, …] → [blocks, eights, lower or upper, 8, …]
        halves = torch.nn.functional.pad(tensor.view(-1, half, tensor.shape[1]), (0, 0, 0, 8 * eights - half))
        return halves.view(-1, 2, eights, 8, tensor.shape[1]).transpose(1, 2).reshape(-1, tensor.shape[1])

    return Int4Weight(
        interleaved(weight.qweight),
        interleaved(weight.scales.T.contiguous()).T.contiguous(),
        interleaved(weight.zeros.T.contiguous()).T.contiguous(),
        weight.group_size,
    )


class DequantizeArguments(ctypes.Structure):
    """`struct Arguments` of dequantize.cu and dequantize_wgmma.cu."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("out_features", "in_features", "half")),
    )


def dequantize(source: Path, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in 16 bit, as `Int4Weight.dequantize` gave it before it was packed."""
    out = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=packed.units.device)
    arguments = DequantizeArguments(
        weight=packed.units.data_ptr(),
        out=out.data_ptr(),
        out_features=packed.out_features,
        in_features=packed.in_features,
        half=packed.half,
    )
    defines = (
        ("BF16", int(dtype == torch.bfloat16)),
        ("GROUP", packed.group_size),
        ("PAIRED", int(packed.half > 0)),
    )
    kernel = nvrtc.kernel(source, "dequantize", defines, out.device)
    blocks = 8 * torch.cuda.get_device_properties(out.device).multi_processor_count
    kernel.launch(grid=blocks, threads=256, shared_bytes=0, arguments=arguments)
    return out


def multiply_in_slices(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    multiply: Callable[[torch.Tensor, Packed, torch.Tensor | None, torch.Tensor], None],
    max_tokens: int,
) -> torch.Tensor:
    """y [M, N] for x [M, K] by a kernel that takes so many tokens at a time."""
    tokens = x.shape[0]
    y = x.new_empty(tokens, packed.result_features)
    for first in range(0, tokens, max_tokens):
        multiply(x[first : first + max_tokens], packed, bias, y[first : first + max_tokens])
    return y


def check_operands(x: torch.Tensor, packed: Packed, max_tokens: int) -> None:
    """What the kernels rely on: 1 ≤ M ≤ max_tokens, rows of x dense and 16-byte aligned."""
    assert 1 <= x.shape[0] <= max_tokens, x.shape
    assert x.shape[1] == packed.in_features, (x.shape, packed.in_features)
    assert x.stride(1) == 1, x.stride()
    assert x.stride(0) % 8 == 0 or x.shape[0] == 1, x.stride()
    assert x.data_ptr() % 16 == 0, x.data_ptr()


def supports(spec: Spec) -> str | None:
    """None where CUDA kernels for 4-bit weights run, else why not."""
    if spec.device.type != "cuda":
        return "CUDA kernels run on CUDA GPUs"
    if spec.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {spec.capability[0]}.{spec.capability[1]}"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in fp16 or bf16, not {spec.dtype}"
    if spec.sizes["group_size"] not in (32, 64, 128):
        return f"groups must be 32, 64 or 128, not {spec.sizes['group_size']}"
    if spec.sizes["in_features"] % 8:
        return f"in_features must be a multiple of 8, not {spec.sizes['in_features']}"
    return nvrtc.why_not()
