"""int4_linear and int4_gated by mma.sync, sm_80 and newer: `w4a16.cu` for few tokens, its layout and division of work.

A weight becomes units of 32 rows × 128 k, [row tiles, units of K], each one contiguous chunk of bytes:

    codes   [chunk of 32 k: 4][lane: 32][mma step: 2][row tile] words
            a word, from its lowest nibble: k0 of rows g and g + 8, k0 + 2 of both, k0 + 1 of both, k0 + 3 of both,
            where g = lane // 4 and k0 = 32 · chunk + 8 · (lane % 4) + 4 · step
    scales  [group][g: 8][row tile][row g, row g + 8] 16-bit floats
    zeros   [group][g: 8][row tile] bytes: low nibble row g, high nibble row g + 8

Rows and columns that fill up the last units have scale 0. A gated weight, gate rows above up rows, is packed with eight
gate rows and the eight up rows that belong to them in each tile of 16: a lane then holds both factors of its results.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nybble.kernels import triton
from nybble.kernels.cuda import nvrtc
from nybble.kernels.cuda import packed as packing
from nybble.kernels.cuda.packed import UNIT_K, Packed, filled
from nybble.kernels.int4_weight import Int4Weight

silu_mul = triton.deferred("silu_mul")

SOURCE = Path(__file__).parent / "w4a16.cu"
DEQUANTIZE = Path(__file__).parent / "dequantize.cu"
MAX_TOKENS = 32  # of one launch
SLICED_TOKENS = 64  # up to here two launches beat a 16-bit copy of the weight
ROW_TILES = 2  # 16 rows each, in a unit
ROWS = 16 * ROW_TILES


@dataclass(frozen=True)
class Tuning:
    """Compile-time choices of the kernel."""

    warps: int
    slots: int  # units that a warp has in flight or in use


def tuning_for(tokens: int) -> Tuning:
    """What was fastest over the linears of Qwen2.5-32B on an H200 (docs/log.md, 2026-11-26)."""
    if tokens <= 4:
        return Tuning(warps=12, slots=2)
    return Tuning(warps=16, slots=2) if tokens <= 16 else Tuning(warps=8, slots=3)


def prepare(weight: Int4Weight) -> Packed:
    """Lay out `weight`, on its device, as the kernel reads it."""
    groups = UNIT_K // weight.group_size
    tiles, units = -(-weight.out_features // ROWS), -(-weight.in_features // UNIT_K)

    codes = filled(weight.codes(), tiles * ROWS, units * UNIT_K)
    # Dimensions: tile, row tile, upper half, g, unit, chunk, t, step, and k0 + 2·d + e.
    codes = codes.view(tiles, ROW_TILES, 2, 8, units, 4, 4, 2, 2, 2)
    codes = codes[:, :, 0] | codes[:, :, 1] << 4
    codes = codes.permute(0, 3, 4, 2, 5, 6, 1, 8, 7).reshape(tiles, units, -1)

    def by_row(tensor: torch.Tensor) -> torch.Tensor:  # [groups of K, N] → [tile, unit, group, g, row tile, upper half]
        tensor = filled(tensor, units * groups, tiles * ROWS)
        return tensor.view(units, groups, tiles, ROW_TILES, 2, 8).permute(2, 0, 1, 5, 3, 4)

    scales = by_row(weight.scales).contiguous().view(torch.uint8).reshape(tiles, units, -1)
    zeros = by_row(weight.zeros)
    zeros = (zeros[..., 0] | zeros[..., 1] << 4).reshape(tiles, units, -1)
    # Blocks that delivered their part of a tile; zero between launches.
    arrivals = torch.zeros(tiles, dtype=torch.int32, device=codes.device)
    packed = torch.cat((codes, scales, zeros), dim=2)
    return Packed(packed, weight.in_features, weight.out_features, weight.group_size, arrivals=arrivals)


def prepare_gated(weight: Int4Weight) -> Packed:
    """The same for the weight of `int4_gated`."""
    half = weight.out_features // 2
    rows = packing.paired(weight, half)
    return replace(prepare(rows), out_features=weight.out_features, is_gated=True, half=half)


@dataclass(frozen=True)
class Plan:
    """How one launch divides its work; mirrors what the kernel computes from `slices` and the grid."""

    slices: int  # parts of K
    max_parts: int  # most blocks that share a row tile within a slice
    shared_bytes: int


@functools.cache
def plan(tokens: int, tiles: int, units: int, group_size: int, blocks: int, shared_limit: int, tuning: Tuning) -> Plan:
    """Cut K into the fewest slices whose activations fit and which leave no block with much more than its share.

    Args:
        units: of K. blocks: one a multiprocessor; every slice gets the same number of them, a remainder idles.
        shared_limit: bytes of shared memory that a block may have.
    """
    token_tiles = -(-tokens // 8)
    ring_bytes = tuning.warps * tuning.slots * (packing.unit_bytes(ROWS, group_size) + 8) + 8
    best: tuple[int, Plan] | None = None
    for slices in range(1, min(blocks, units) + 1):
        width = -(-units // slices)
        sums_bytes = width * (UNIT_K // group_size) * token_tiles * 8 * 4
        shared_bytes = ring_bytes + sums_bytes + width * tokens * UNIT_K * 2
        if shared_bytes > shared_limit:
            continue
        quota = -(-tiles * width // (blocks // slices))
        cost = quota + slices  # a slice more costs each block about one unit of reduction
        if best is None or cost < best[0]:
            least_quota = -(-tiles * (units // slices) // (blocks // slices))
            best = cost, Plan(slices, -(-(width - 1) // least_quota) + 1, shared_bytes)
    assert best is not None, f"no division of {units} units fits {shared_limit} bytes"
    return best[1]


class Arguments(ctypes.Structure):
    """`struct Arguments` of w4a16.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y", "partial", "arrivals")),
        *((name, ctypes.c_int) for name in ("x_row", "tokens", "in_features", "out_features", "slices", "max_parts")),
    )


def launch(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] for x [M, K], rows of x 16-byte aligned.

    Up to SLICED_TOKENS tokens go through the kernel, MAX_TOKENS at a time; for more the weight is made 16 bit first and
    cuBLAS multiplies.
    """
    if x.shape[0] > SLICED_TOKENS:
        return torch.nn.functional.linear(x, packing.dequantize(DEQUANTIZE, packed, x.dtype), bias)
    return packing.multiply_in_slices(x, packed, bias, multiply_few, MAX_TOKENS)


def launch_gated(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """silu(gate) · up [M, I] for x [M, K]."""
    y = launch(x, packed, None)
    return silu_mul(y) if x.shape[0] > SLICED_TOKENS else y


def multiply_few(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    tuning: Tuning | None = None,
    overlap: bool = True,
) -> None:
    """Compute y [M, N], 1 ≤ M ≤ MAX_TOKENS, by the kernel.

    Args:
        overlap: start while the kernel before still runs (programmatic dependent launch); results are the same.
    """
    packing.check_operands(x, packed, MAX_TOKENS)
    assert packed.arrivals is not None
    tokens = x.shape[0]
    tuning = tuning or tuning_for(tokens)
    tiles, units, _ = packed.units.shape
    device = torch.cuda.get_device_properties(x.device)
    blocks, shared_limit = device.multi_processor_count, device.shared_memory_per_block_optin
    work = plan(tokens, tiles, units, packed.group_size, blocks, shared_limit, tuning)
    token_tiles = -(-tokens // 8)
    # Only the parts of tiles that blocks share are ever touched.
    partial_shape = (tiles, work.slices, work.max_parts, ROWS * token_tiles * 8)
    partial = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
    arguments = Arguments(
        x=x.data_ptr(),
        weight=packed.units.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        partial=partial.data_ptr(),
        arrivals=packed.arrivals.data_ptr(),
        x_row=x.stride(0),
        tokens=tokens,
        in_features=packed.in_features,
        out_features=packed.out_features,
        slices=work.slices,
        max_parts=work.max_parts,
    )
    defines = (
        ("BF16", int(x.dtype == torch.bfloat16)),
        ("GROUP", packed.group_size),
        ("GATED", int(packed.is_gated)),
        ("TOKEN_TILES", token_tiles),
        ("WARPS", tuning.warps),
        ("SLOTS", tuning.slots),
    )
    kernel = nvrtc.kernel(SOURCE, "w4a16", defines, x.device)
    kernel.launch(
        grid=blocks // work.slices * work.slices,
        threads=32 * tuning.warps,
        shared_bytes=work.shared_bytes,
        arguments=arguments,
        overlap=overlap,
    )
