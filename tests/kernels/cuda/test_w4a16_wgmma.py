"""The Hopper int4 kernel as far as a machine without a GPU goes: its weight layout, its division of work, its code."""

import itertools
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from nybble.kernels.check import relative_error
from nybble.kernels.cuda import packed, w4a16_wgmma
from nybble.kernels.int4_linear import MODEL_SHAPES
from nybble.kernels.int4_weight import random_int4_weight
from nybble.kernels.op import Spec

SHARED_LIMIT = 232_448  # bytes a block may have on Hopper


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 256), (72, 384), (136, 128), (40, 64)])
def test_every_code_scale_and_zero_lies_where_the_layout_says(
    out_features: int, in_features: int, group_size: int
) -> None:
    """Read back element by element, from the description at the top of w4a16_wgmma.py."""
    if in_features % group_size:
        pytest.skip("no whole group")
    generator = torch.Generator().manual_seed(0)
    weight = random_int4_weight(out_features, in_features, group_size, torch.float16, generator=generator)
    units = w4a16_wgmma.prepare(weight).units
    codes = weight.codes()
    groups = 128 // group_size
    order = [(0, 0), (8, 0), (0, 8), (8, 8), (0, 1), (8, 1), (0, 9), (8, 9)]  # row and k of each nibble
    for n, k in itertools.product(range(out_features), range(in_features)):
        row_unit, row = divmod(n, 64)
        sixteenth, within = divmod(row, 16)
        upper, g = divmod(within, 8)
        unit, inside = divmod(k, 128)
        half, rest = divmod(inside, 64)
        step, last = divmod(rest, 16)
        eight, last = divmod(last, 8)
        t, odd = divmod(last, 2)
        word = ((sixteenth * 2 + half) * 32 + g * 4 + t) * 4 + step
        nibble = order.index((8 * upper, 8 * eight + odd))
        byte = int(units[row_unit, unit, word * 4 + nibble // 2])
        assert byte >> 4 * (nibble % 2) & 15 == codes[n, k], (n, k)
        if k % group_size == 0:
            at = (inside // group_size * 4 + sixteenth) * 8 + g
            scale = units[row_unit, unit, 4096 + at * 4 + 2 * upper :][:2].view(torch.float16)
            assert scale == weight.scales[k // group_size, n]
            zero = int(units[row_unit, unit, 4096 + groups * 128 + at]) >> 4 * upper & 15
            assert zero == weight.zeros[k // group_size, n]


@pytest.mark.parametrize("processors", [132, 114, 78])
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 128])
def test_the_division_covers_every_step_once_and_fits(processors: int, tokens: int) -> None:
    """The blocks' ranges as the kernel works them out; for the linears of five models."""
    tuning = w4a16_wgmma.tuning_for(tokens)
    assert w4a16_wgmma.shared_bytes(tuning, 128) <= SHARED_LIMIT
    for in_features, out_features in {*itertools.chain(*MODEL_SHAPES.values()), (128, 64), (160, 264), (384, 72)}:
        units = -(-in_features // packed.UNIT_K)
        work = w4a16_wgmma.plan(-(-out_features // 64), units, processors, tuning)
        covered: Counter[int] = Counter()
        for block in range(work.blocks):
            begin = block * work.quota + min(block, work.extra)
            for step in range(begin, begin + work.quota + (block < work.extra)):
                covered[step] += 1
        assert set(covered) == set(range(work.tiles * units))
        assert set(covered.values()) == {1}


def test_it_refuses_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(device=torch.device("cuda"), dtype=torch.float16, sizes={"group_size": 128, "in_features": 128})
    monkeypatch.setattr(Spec, "capability", (8, 6))
    assert w4a16_wgmma.supports(spec) == "wgmma needs compute capability 9.x, this GPU has 8.6"


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [0, 1])
def test_the_sources_compile_without_spills(bf16: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    for tokens, group_size in ((1, 128), (8, 32), (16, 32), (16, 128), (32, 128), (64, 64), (128, 128)):
        values = w4a16_wgmma.defines(
            w4a16_wgmma.tuning_for(tokens), bf16=bf16, group_size=group_size, gated=tokens == 16
        )
        for source in (w4a16_wgmma.SOURCE, w4a16_wgmma.DEQUANTIZE):
            command = [nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-use_fast_math", "-Xptxas", "-v"]
            command += ["-cubin", *(f"-D{name}={value}" for name, value in values)]
            done = subprocess.run([*command, source, "-o", tmp_path / "cubin"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
            assert "serialized" not in done.stderr, done.stderr  # wgmma that the compiler could not let run on


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5120, 5120), (5120, 1408), (704, 2560)], ids=str)
def test_every_part_that_blocks_leave_is_taken_and_a_hundred_launches_agree(shape: tuple[int, int]) -> None:
    """A part that stays would be taken for the next launch's, by an opener that looks before that is there."""
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    weight = random_int4_weight(*shape, 128, torch.float16, device=device, generator=generator)
    units = w4a16_wgmma.prepare(weight)
    for tokens in (1, 3, 8, 9, 16, 17, 100):
        x = torch.randn(tokens, shape[1], device=device, dtype=torch.float16, generator=generator)
        first = w4a16_wgmma.launch(x, units, None)
        assert relative_error(first, x.double() @ weight.dequantize(torch.float64).T) < 1e-3
        for _ in range(100):
            assert torch.equal(w4a16_wgmma.launch(x, units, None), first), tokens
        scratch = w4a16_wgmma.scratch(x.device, torch.cuda.current_stream(x.device).cuda_stream)
        parts, flags = scratch.sums(w4a16_wgmma.tuning_for(1)), scratch.flags
        assert bool((parts == -1).all())
        assert bool((flags == 0).all())
