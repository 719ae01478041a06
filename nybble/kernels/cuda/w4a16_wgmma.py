"""int4_linear, int4_gated and int4_qkv on Hopper: `w4a16_wgmma.cu`, its weight layout and its launch.

A weight becomes units of 64 rows × 128 k, [row units, units of K], each one contiguous chunk of bytes:

    codes   [16 rows: 4][half of K: 2][lane: 32][step of 16 k: 4] words
            a word, from its lowest nibble: k0 of rows g and g + 8, k0 + 8 of both, k0 + 1 of both, k0 + 9 of both,
            where g = lane // 4 and k0 = 64 · half + 16 · step + 2 · (lane % 4)
    scales  [group][16 rows: 4][g: 8][row g, row g + 8] 16-bit floats
    zeros   [group][16 rows: 4][g: 8] bytes: low nibble row g, high nibble row g + 8

Rows and columns that fill up the last units have scale 0. A gated weight, gate rows above up rows, is packed with eight
gate rows and the eight up rows that belong to them in each 16: a lane then holds both factors of its results.
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
from nybble.kernels.op import Spec

silu_mul = triton.deferred("silu_mul")
rotary = triton.deferred("rotary")
kv_write = triton.deferred("kv_write")

SOURCE = Path(__file__).parent / "w4a16_wgmma.cu"
DEQUANTIZE = Path(__file__).parent / "dequantize_wgmma.cu"
UNIT_ROWS = 64
MAX_TOKENS = 128  # of one launch
SLICED_TOKENS = 512  # up to here several launches beat a 16-bit copy of the weight


@dataclass(frozen=True)
class Tuning:
    """Compile-time choices of the kernel; w4a16_units.cuh explains them."""

    token_tiles: int  # of 8 tokens
    fold: bool
    warpgroups: int
    slots: int
    wgmma: bool = True  # else mma.sync

    @property
    def consumers(self) -> int:
        """Threads that multiply."""
        return 128 * self.warpgroups

    @property
    def helpers(self) -> int:
        """Threads that bring weights and x; for mma.sync also those that sum x."""
        return 32 if self.wgmma else 64


def tuning_for(tokens: int) -> Tuning:
    """What was fastest over the linears of Qwen2.5-32B (docs/log.md, 2026-11-26 and 27).

    Up to 16 tokens a ring takes more than half of a multiprocessor's shared memory: were there room for two blocks, two
    of one launch would meet on one multiprocessor and leave another without any.
    """
    if tokens <= 8:
        return Tuning(token_tiles=1, fold=False, warpgroups=3, slots=8, wgmma=False)
    if tokens <= 16:
        return Tuning(token_tiles=2, fold=False, warpgroups=3, slots=7, wgmma=False)
    if tokens <= 32:
        return Tuning(token_tiles=4, fold=False, warpgroups=3, slots=5)
    if tokens <= 64:
        return Tuning(token_tiles=8, fold=True, warpgroups=3, slots=4)
    return Tuning(token_tiles=16, fold=True, warpgroups=2, slots=4)


def prepare(weight: Int4Weight) -> Packed:
    """Lay out `weight`, on its device, as the kernel reads it."""
    groups = UNIT_K // weight.group_size
    tiles, units = -(-weight.out_features // UNIT_ROWS), -(-weight.in_features // UNIT_K)

    codes = filled(weight.codes(), tiles * UNIT_ROWS, units * UNIT_K)
    # Dimensions: tile, 16 rows, upper half, g, unit, half of K, step, k0 + 8 · d, t, k0 + e.
    codes = codes.view(tiles, 4, 2, 8, units, 2, 4, 2, 4, 2)
    codes = codes[:, :, 0] | codes[:, :, 1] << 4  # tile, 16 rows, g, unit, half, step, d, t, e
    codes = codes.permute(0, 3, 1, 4, 2, 7, 5, 8, 6).reshape(tiles, units, -1)

    def by_row(tensor: torch.Tensor) -> torch.Tensor:  # [groups of K, N] → [tile, unit, group, 16 rows, g, upper half]
        tensor = filled(tensor, units * groups, tiles * UNIT_ROWS)
        return tensor.view(units, groups, tiles, 4, 2, 8).permute(2, 0, 1, 3, 5, 4)

    scales = by_row(weight.scales).contiguous().view(torch.uint8).reshape(tiles, units, -1)
    zeros = by_row(weight.zeros)
    zeros = (zeros[..., 0] | zeros[..., 1] << 4).reshape(tiles, units, -1)
    packed = torch.cat((codes, scales, zeros), dim=2)
    return Packed(packed, weight.in_features, weight.out_features, weight.group_size)


def prepare_gated(weight: Int4Weight) -> Packed:
    """The same for the weight of `int4_gated`."""
    half = weight.out_features // 2
    rows = packing.paired(weight, half)
    return replace(prepare(rows), out_features=weight.out_features, is_gated=True, half=half)


def launch(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] for x [M, K], rows of x 16-byte aligned.

    Up to SLICED_TOKENS tokens go through the kernel, MAX_TOKENS at a time; for more the weight is made 16 bit first and
    cuBLAS multiplies.
    """
    if x.shape[0] > SLICED_TOKENS:
        return torch.nn.functional.linear(x, packing.dequantize(DEQUANTIZE, packed, x.dtype), bias)
    return packing.multiply_in_slices(x, packed, bias, multiply, MAX_TOKENS)


def launch_gated(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """silu(gate) · up [M, I] for x [M, K]."""
    y = launch(x, packed, None)
    return silu_mul(y) if x.shape[0] > SLICED_TOKENS else y


def prepare_qkv(weight: Int4Weight, *, head_dim: int, rotary_dim: int) -> Packed:
    """The same for the weight of `int4_qkv`."""
    assert head_dim == rotary_dim, (head_dim, rotary_dim)
    half = rotary_dim // 2
    return replace(prepare(packing.paired(weight, half)), half=half)


def launch_qkv(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Queries [M, Hq, D] for x [M, K], turned; keys and values go into the cache."""
    kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = (packed.out_features // head_dim - 2 * kv_heads, kv_heads, kv_heads)
    if x.shape[0] > SLICED_TOKENS:
        q, k, v = launch(x, packed, bias).unflatten(-1, (-1, head_dim)).split(heads, dim=1)
        rotary(q, k, positions, cos_sin)
        kv_write(k, v, key_cache, value_cache, slot_mapping)
        return q
    q = x.new_empty(x.shape[0], heads[0], head_dim)
    for first in range(0, x.shape[0], MAX_TOKENS):
        rows = slice(first, first + MAX_TOKENS)
        rotation = Rotation(
            positions=positions[rows].data_ptr(),
            slots=slot_mapping[rows].data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            key_cache=key_cache.data_ptr(),
            value_cache=value_cache.data_ptr(),
            q_heads=heads[0],
            kv_heads=kv_heads,
            block_size=key_cache.shape[2],
        )
        multiply(x[rows], packed, bias, q[rows], rotation=rotation)
    return q


def supports(spec: Spec) -> str | None:
    """None where the kernel runs, else why not."""
    if spec.device.type == "cuda" and spec.capability[0] != 9:
        return "wgmma needs compute capability 9.x, this GPU has {}.{}".format(*spec.capability)
    return packing.supports(spec)


def supports_qkv(spec: Spec) -> str | None:
    """The same for `int4_qkv`."""
    head_dim = spec.sizes["head_dim"]
    if head_dim != spec.sizes["rotary_dim"] or head_dim % 16:
        return f"heads must be turned whole and be a multiple of 16, not {spec.sizes['rotary_dim']} of {head_dim}"
    return supports(spec)


@dataclass(frozen=True)
class Plan:
    """How one launch divides its steps: `quota` in a row a block, one more for the first `extra` blocks."""

    tiles: int  # of rows
    blocks: int
    quota: int
    extra: int


@functools.cache
def plan(row_units: int, units: int, processors: int, tuning: Tuning) -> Plan:
    """Deal the steps, `units` of each tile, evenly to one block a multiprocessor."""
    tiles = -(-row_units // tuning.warpgroups)
    blocks = min(processors, tiles * units)
    quota, extra = divmod(tiles * units, blocks)
    return Plan(tiles, blocks, quota, extra)


class Scratch:
    """Where the blocks of a launch leave their parts of a tile; all empty between launches.

    Launches on one stream follow each other, so they share it; a graph keeps the one of the stream it was captured on,
    where it is also to be replayed. One for parts that are their own flags, one for flagged ones.
    """

    def __init__(self, device: torch.device) -> None:
        blocks = torch.cuda.get_device_properties(device).multi_processor_count

        def empty(sums: int) -> torch.Tensor:
            return torch.full((blocks, sums), -1, dtype=torch.int32, device=device)

        self._few, self._many = empty(256 * 16), empty(256 * 64)  # rows of a tile × tokens, at most
        self.flags = torch.zeros(blocks, 64, dtype=torch.int32, device=device)

    def sums(self, tuning: Tuning) -> torch.Tensor:
        """[blocks, a tile's sums at most]; of mma.sync a part is its own flag (`kFlagged` in the kernel)."""
        sums = self._many if tuning.wgmma else self._few
        assert tuning.warpgroups * UNIT_ROWS * 8 * tuning.token_tiles <= sums.shape[1], tuning
        return sums


@functools.cache
def scratch(device: torch.device, stream: int) -> Scratch:
    return Scratch(device)


class Linear(ctypes.Structure):
    """`struct Linear` of w4a16_units.cuh."""

    _fields_ = (
        ("x_map", ctypes.c_byte * 128),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "y")),
        *((name, ctypes.c_int) for name in ("out_features", "row_units", "units_k", "quota", "extra", "half")),
        ("padding", ctypes.c_byte * 16),  # to a multiple of 64
    )


class Parts(ctypes.Structure):
    """`struct Parts` of w4a16_units.cuh."""

    _fields_ = (("sums", ctypes.c_void_p), ("flags", ctypes.c_void_p))


class Rotation(ctypes.Structure):
    """`struct Rotation` of w4a16_results.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "cos_sin", "key_cache", "value_cache")),
        *((name, ctypes.c_int) for name in ("q_heads", "kv_heads", "block_size")),
    )


class Arguments(ctypes.Structure):
    """`struct Arguments` of w4a16_wgmma.cu."""

    _fields_ = (
        ("linear", Linear),
        ("parts", Parts),
        ("rotation", Rotation),
        ("tokens", ctypes.c_int),
        ("padding", ctypes.c_byte * 52),
    )


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, tokens: int, features: int, row: int, is_bf16: bool, width: int) -> bytes:
    """How the copy engine finds x [tokens, features], rows `row` elements apart: boxes of `width` tokens × 64 k.

    Outside of x it finds zeros. Cached: a model's buffers come back at the same addresses.
    """
    from cuda.bindings import driver

    ints, longs = driver.cuuint32_t, driver.cuuint64_t
    types = driver.CUtensorMapDataType
    encoded = nvrtc.check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if is_bf16 else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2,
            address,
            [longs(features), longs(tokens)],
            [longs(2 * row)],
            [ints(64), ints(width)],
            [ints(1), ints(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )
    return ctypes.string_at(encoded.getPtr(), 128)


def multiply(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    rotation: Rotation | None = None,
    tuning: Tuning | None = None,
    overlap: bool = True,
) -> None:
    """Compute y [M, N], 1 ≤ M ≤ MAX_TOKENS, by the kernel.

    Args:
        rotation: N are heads of queries, keys and values: turn the first two, write the last two to the cache, y gets
            the queries only.
        overlap: start while the kernel before still runs (programmatic dependent launch); results are the same.
    """
    packing.check_operands(x, packed, MAX_TOKENS)
    tokens = x.shape[0]
    tuning = tuning or tuning_for(tokens)
    work = plan_for(packed, x.device, tuning)
    arguments = Arguments(
        linear=linear_argument(x, packed, bias, y, tuning, work),
        parts=parts_argument(x.device, tuning),
        rotation=rotation or Rotation(),
        tokens=tokens,
    )
    choices = defines(
        tuning,
        bf16=x.dtype == torch.bfloat16,
        group_size=packed.group_size,
        gated=packed.is_gated,
        rotated=rotation is not None,
    )
    nvrtc.kernel(SOURCE, "w4a16", choices, x.device).launch(
        grid=work.blocks,
        threads=tuning.consumers + tuning.helpers,
        shared_bytes=shared_bytes(tuning, packed.group_size),
        arguments=arguments,
        overlap=overlap,
    )


def linear_argument(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, y: torch.Tensor, tuning: Tuning, work: Plan
) -> Linear:
    """y = x Wᵀ + bias as the kernel wants to be told."""
    row_units, units, _ = packed.units.shape
    x_map = tensor_map(
        x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), x.dtype == torch.bfloat16, 8 * tuning.token_tiles
    )
    return Linear(
        x_map=(ctypes.c_byte * 128).from_buffer_copy(x_map),
        weight=packed.units.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        out_features=packed.out_features,
        row_units=row_units,
        units_k=units,
        quota=work.quota,
        extra=work.extra,
        half=packed.half,
    )


def parts_argument(device: torch.device, tuning: Tuning) -> Parts:
    """Where the blocks of the current stream's launches leave their parts."""
    parts = scratch(device, torch.cuda.current_stream(device).cuda_stream)
    return Parts(sums=parts.sums(tuning).data_ptr(), flags=parts.flags.data_ptr())


def plan_for(packed: Packed, device: torch.device, tuning: Tuning) -> Plan:
    """How this GPU divides the product."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return plan(packed.units.shape[0], packed.units.shape[1], processors, tuning)


def defines(
    tuning: Tuning, *, bf16: bool, group_size: int, gated: bool = False, rotated: bool = False
) -> nvrtc.Defines:
    """What w4a16_wgmma.cu is compiled for."""
    return (
        ("BF16", int(bf16)),
        ("GROUP", group_size),
        ("GATED", int(gated)),
        ("ROTATED", int(rotated)),
        ("TOKEN_TILES", tuning.token_tiles),
        ("WGMMA", int(tuning.wgmma)),
        ("FOLD", int(tuning.wgmma and (tuning.fold or group_size < UNIT_K))),
        ("WARPGROUPS", tuning.warpgroups),
        ("SLOTS", tuning.slots),
    )


def shared_bytes(tuning: Tuning, group_size: int) -> int:
    """`sizeof(Shared)` of w4a16_units.cuh."""
    tokens = 8 * tuning.token_tiles
    barriers = 16 if tuning.wgmma else 24
    x_sums = 0 if tuning.wgmma else UNIT_K // group_size * tokens * 4
    unit = packing.unit_bytes(UNIT_ROWS, group_size)
    return tuning.slots * (tokens * UNIT_K * 2 + tuning.warpgroups * unit + barriers + x_sums)
