"""The CUDA implementation of int4_linear for up to 16 tokens: `w4a16.cu`, its weight layout and its division of work.

A weight becomes units of 16·ROW_TILES rows × 128 k, [row tiles, units of K], each one contiguous chunk of bytes:

    codes   [chunk of 32 k: 4][lane: 32][mma step: 2][row tile] words          (step before lane if ROW_TILES is 4)
            a word, from its lowest nibble: k0 of rows g and g + 8, k0 + 2 of both, k0 + 1 of both, k0 + 3 of both,
            where g = lane // 4 and k0 = 32 · chunk + 8 · (lane % 4) + 4 · step
    scales  [group][g: 8][row tile][row g, row g + 8] 16-bit floats
    zeros   [group][g: 8][row tile] bytes: low nibble row g, high nibble row g + 8

Rows and columns that fill up the last units have scale 0.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.kernels.cuda import nvrtc
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Impl, Spec

SOURCE = Path(__file__).parent / "w4a16.cu"
UNIT_K = 128
MAX_TOKENS = 16


@dataclass(frozen=True)
class Tuning:
    """Compile-time choices of the kernel. `row_tiles` also shapes the packed weight."""

    row_tiles: int = 2
    warps: int = 8
    slots: int = 4  # units that a warp has in flight or in use
    prefetch: int = 8  # units that a warp asks into L2 beyond those
    trigger: int = 12  # units left in a block's first warp when the next kernel may start
    x_bytes: int = 41_000  # shared memory for activations, below which K is not cut further

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles

    def unit_bytes(self, group_size: int) -> int:
        groups = UNIT_K // group_size
        return self.rows * UNIT_K // 2 + groups * self.rows * 2 + groups * self.rows // 2


DEFAULT = Tuning()


@dataclass(frozen=True)
class Packed:
    units: torch.Tensor  # uint8 [row tiles, units of K, bytes of a unit]
    arrivals: torch.Tensor  # int32 [row tiles]: blocks that delivered their part of a tile; zero between launches
    in_features: int
    out_features: int
    group_size: int


def prepare(weight: Int4Weight, tuning: Tuning = DEFAULT) -> Packed:
    """Lay out `weight`, on its device, as the kernel reads it."""
    rows, groups = tuning.rows, UNIT_K // weight.group_size
    tiles, units = -(-weight.out_features // rows), -(-weight.in_features // UNIT_K)

    def filled(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, shape[1] - tensor.shape[1], 0, shape[0] - tensor.shape[0]))

    codes = filled(weight.codes(), tiles * rows, units * UNIT_K)
    # Dimensions: tile, row tile, upper half, g, unit, chunk, t, step, and k0 + 2·d + e.
    codes = codes.view(tiles, tuning.row_tiles, 2, 8, units, 4, 4, 2, 2, 2)
    codes = codes[:, :, 0] | codes[:, :, 1] << 4
    order = (0, 3, 4, 2, 5, 6, 1, 8, 7) if tuning.row_tiles == 2 else (0, 3, 4, 6, 2, 5, 1, 8, 7)
    codes = codes.permute(order).reshape(tiles, units, -1)

    def by_row(tensor: torch.Tensor) -> torch.Tensor:  # [groups of K, N] → [tile, unit, group, g, row tile, upper half]
        tensor = filled(tensor, units * groups, tiles * rows)
        return tensor.view(units, groups, tiles, tuning.row_tiles, 2, 8).permute(2, 0, 1, 5, 3, 4)

    scales = by_row(weight.scales).contiguous().view(torch.uint8).reshape(tiles, units, -1)
    zeros = by_row(weight.zeros)
    zeros = (zeros[..., 0] | zeros[..., 1] << 4).reshape(tiles, units, -1)
    arrivals = torch.zeros(tiles, dtype=torch.int32, device=codes.device)
    packed = torch.cat((codes, scales, zeros), dim=2)
    return Packed(packed, arrivals, weight.in_features, weight.out_features, weight.group_size)


@dataclass(frozen=True)
class Plan:
    """How one launch divides its work; mirrors what the kernel computes from `slices` and the grid."""

    slices: int  # parts of K
    max_parts: int  # most blocks that share a row tile within a slice
    shared_bytes: int


@functools.cache
def plan(tokens: int, tiles: int, units: int, group_size: int, blocks: int, tuning: Tuning = DEFAULT) -> Plan:
    """Cut K into the fewest slices whose activations fit and which leave no block with much more than its share.

    Args:
        units: of K. blocks: one a multiprocessor; every slice gets the same number of them.
    """
    token_tiles = -(-tokens // 8)
    best: tuple[float, int] | None = None
    for slices in (s for s in range(1, min(blocks, units) + 1) if blocks % s == 0):
        width = -(-units // slices)
        quota = -(-tiles * width // (blocks // slices))
        too_wide = width * tokens * UNIT_K * 2 > tuning.x_bytes
        # A slice more costs each block about one unit of reduction.
        cost = quota + slices + (1e9 * width if too_wide else 0)
        if best is None or cost < best[0]:
            best = cost, slices
    assert best is not None
    slices = best[1]
    width = -(-units // slices)
    quota = -(-tiles * (units // slices) // (blocks // slices))
    sums = width * (UNIT_K // group_size) * token_tiles * 8 * 4
    ring = tuning.warps * tuning.slots * (tuning.unit_bytes(group_size) + 8) + 8
    return Plan(slices, -(-(width - 1) // quota) + 1, ring + sums + width * tokens * UNIT_K * 2)


class Arguments(ctypes.Structure):
    """`struct Arguments` of w4a16.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y", "partial", "arrivals")),
        *((name, ctypes.c_int) for name in ("x_row", "tokens", "in_features", "out_features", "slices", "max_parts")),
    )


def launch(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, *, tuning: Tuning = DEFAULT, overlap: bool = True
) -> torch.Tensor:
    """y [M, N] for x [M, K], 1 ≤ M ≤ 16, rows of x 16-byte aligned.

    Args:
        overlap: start while the kernel before still runs (programmatic dependent launch); results are the same.
    """
    tokens = x.shape[0]
    assert 1 <= tokens <= MAX_TOKENS, tokens
    assert x.shape[1] == packed.in_features, (x.shape, packed.in_features)
    assert x.stride(1) == 1, x.stride()
    assert x.stride(0) % 8 == 0 or tokens == 1, x.stride()
    assert x.data_ptr() % 16 == 0, x.data_ptr()
    tiles, units, _ = packed.units.shape
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    work = plan(tokens, tiles, units, packed.group_size, blocks, tuning)
    token_tiles = -(-tokens // 8)
    y = x.new_empty(tokens, packed.out_features)
    # Only the parts of tiles that blocks share are ever touched.
    partial_shape = (tiles, work.slices, work.max_parts, tuning.rows * token_tiles * 8)
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
        ("TOKEN_TILES", token_tiles),
        ("ROW_TILES", tuning.row_tiles),
        ("WARPS", tuning.warps),
        ("SLOTS", tuning.slots),
        ("PREFETCH", tuning.prefetch),
        ("TRIGGER", tuning.trigger),
    )
    kernel = nvrtc.kernel(SOURCE, "w4a16", defines, x.device)
    kernel.launch(
        grid=blocks // work.slices * work.slices,
        threads=32 * tuning.warps,
        shared_bytes=work.shared_bytes,
        arguments=arguments,
        overlap=overlap,
    )
    return y


def supports(spec: Spec) -> str | None:
    """None where the kernel runs, for any number of tokens up to MAX_TOKENS."""
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


IMPL = Impl(name="cuda", supports=supports, prepare=prepare, launch=launch)
