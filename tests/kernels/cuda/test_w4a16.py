"""The int4 CUDA kernel as far as a machine without a GPU goes: its weight layout, its division of work, its code."""

import itertools
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from nybble.kernels.cuda import packed, w4a16
from nybble.kernels.int4_linear import MODEL_SHAPES
from nybble.kernels.int4_weight import Int4Weight, random_int4_weight
from nybble.kernels.op import Spec

# Multiprocessors and bytes of shared memory a block may have.
GPUS = {"H200": (132, 232_448), "A100": (108, 166_912), "RTX 3090": (82, 101_376)}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 256), (72, 384), (136, 128), (40, 64)])
def test_every_code_scale_and_zero_lies_where_the_layout_says(
    out_features: int, in_features: int, group_size: int
) -> None:
    """Read back element by element, from the description at the top of w4a16.py."""
    if in_features % group_size:
        pytest.skip("no whole group")
    generator = torch.Generator().manual_seed(0)
    weight = random_int4_weight(out_features, in_features, group_size, torch.float16, generator=generator)
    units = w4a16.prepare(weight).units
    codes = weight.codes()
    groups = 128 // group_size
    order = [(0, 0), (8, 0), (0, 2), (8, 2), (0, 1), (8, 1), (0, 3), (8, 3)]  # row and k of each nibble
    for n, k in itertools.product(range(out_features), range(in_features)):
        tile, row = divmod(n, 32)
        row_tile, within = divmod(row, 16)
        upper, g = divmod(within, 8)
        unit, inside = divmod(k, 128)
        chunk, rest = divmod(inside, 32)
        t, last = divmod(rest, 8)
        step, d = divmod(last, 4)
        word = ((chunk * 32 + g * 4 + t) * 2 + step) * 2 + row_tile
        nibble = order.index((8 * upper, d))
        byte = int(units[tile, unit, word * 4 + nibble // 2])
        assert byte >> 4 * (nibble % 2) & 15 == codes[n, k], (n, k)
        if k % group_size == 0:
            group = inside // group_size
            at = 2048 + ((group * 8 + g) * 2 + row_tile) * 4 + 2 * upper
            assert units[tile, unit, at : at + 2].view(torch.float16) == weight.scales[k // group_size, n]
            at = 2048 + groups * 64 + (group * 8 + g) * 2 + row_tile
            assert int(units[tile, unit, at]) >> 4 * upper & 15 == weight.zeros[k // group_size, n]


@pytest.mark.parametrize(("size", "group_size"), [(64, 32), (72, 64), (16, 128)])
def test_a_gated_weight_pairs_gate_and_up_rows(size: int, group_size: int) -> None:
    """Eight gate rows, then their eight up rows."""
    weight = random_int4_weight(2 * size, 256, group_size, torch.float16, generator=torch.Generator().manual_seed(1))
    index = torch.arange(2 * size).view(2, size // 8, 8).transpose(0, 1).flatten()
    paired = Int4Weight(weight.qweight[index], weight.scales[:, index], weight.zeros[:, index], group_size)
    packed = w4a16.prepare_gated(weight)
    assert torch.equal(packed.units, w4a16.prepare(paired).units)
    assert (packed.out_features, packed.result_features) == (2 * size, size)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 16, 17, 32])
def test_the_division_covers_every_unit_once_and_fits(gpu: str, tokens: int) -> None:
    """The blocks' ranges as the kernel works them out, for the linears of five models and some odd ones."""
    processors, limit = GPUS[gpu]
    shapes = {*itertools.chain(*MODEL_SHAPES.values()), (128, 64), (160, 264), (384, 72)}
    for in_features, out_features in shapes:
        tiles, units = ceil_div(out_features, w4a16.ROWS), ceil_div(in_features, packed.UNIT_K)
        work = w4a16.plan(tokens, tiles, units, 128, processors, limit, w4a16.tuning_for(tokens))
        assert work.shared_bytes <= limit
        blocks = processors // work.slices
        covered: Counter[tuple[int, int]] = Counter()
        for index in range(work.slices):
            extra = units % work.slices
            width = units // work.slices + (index < extra)
            first_k = units // work.slices * index + min(index, extra)
            quota = ceil_div(tiles * width, blocks)
            for block in range(blocks):
                for unit in range(block * quota, min((block + 1) * quota, tiles * width)):
                    covered[unit // width, first_k + unit % width] += 1
            for tile in range(tiles):
                parts = ((tile + 1) * width - 1) // quota - tile * width // quota + 1
                assert parts <= work.max_parts
        assert len(covered) == tiles * units
        assert set(covered.values()) == {1}


def test_it_refuses_in_words() -> None:
    sizes = {"group_size": 128, "in_features": 128}
    reason = packed.supports(Spec(device=torch.device("cpu"), dtype=torch.float16, sizes=sizes))
    assert reason == "CUDA kernels run on CUDA GPUs"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
@pytest.mark.parametrize("bf16", [0, 1])
def test_the_sources_compile_without_spills(arch: str, bf16: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    for tokens, group_size in ((1, 128), (16, 32), (32, 64)):
        tuning = w4a16.tuning_for(tokens)
        values = {
            "BF16": bf16,
            "GROUP": group_size,
            "GATED": int(tokens == 16),
            "TOKEN_TILES": ceil_div(tokens, 8),
            "WARPS": tuning.warps,
            "SLOTS": tuning.slots,
        }
        for source in (w4a16.SOURCE, w4a16.DEQUANTIZE):
            command = [nvcc, f"-arch={arch}", "-std=c++17", "-use_fast_math", "-Xptxas", "-v", "-cubin"]
            command += [f"-D{name}={value}" for name, value in values.items()]
            done = subprocess.run([*command, source, "-o", tmp_path / "cubin"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
