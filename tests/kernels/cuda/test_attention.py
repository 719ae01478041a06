"""The CUDA decode attention: what it asks for, its code, and, on a GPU, that blocks hand over and clean up."""

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.kernels.attention import Case, reference
from nybble.kernels.check import relative_error, to_float64
from nybble.kernels.cuda import attention
from nybble.kernels.op import Spec

HOPPER_LIMIT, AMPERE_LIMIT = 232_448, 101_376  # bytes of shared memory that a block may have on sm_90 and sm_86
HEAD_DIMS = (16, 64, 80, 96, 112, 128, 160, 192, 256)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_block_fits_everywhere_and_as_many_on_hopper_as_are_launched(head_dim: int) -> None:
    for rows in (1, 8, 9, 256):
        tuning = attention.tuning_for(head_dim, rows)
        num_bytes = attention.shared_bytes(tuning, head_dim)
        assert num_bytes <= AMPERE_LIMIT
        assert tuning.blocks * (num_bytes + 1024) <= HOPPER_LIMIT + 1024
        assert tuning.stages >= 2
        assert tuning.blocks <= attention.MAX_BLOCKS


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"head_dim": 72}, "heads must be a multiple of 16 up to 256, not 72"),
        ({"query_heads": 96}, "at most 8 query heads may share a KV head, not 12"),
    ],
)
def test_it_refuses_in_words(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], words: str) -> None:
    monkeypatch.setattr(Spec, "capability", (9, 0))
    sizes = {"query_heads": 40, "kv_heads": 8, "head_dim": 128} | sizes
    assert attention.supports(Spec(device=torch.device("cuda"), dtype=torch.float16, sizes=sizes)) == words


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_source_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    for bf16, head_dim, group in ((0, 128, 5), (1, 128, 8), (0, 64, 7), (1, 80, 1), (0, 256, 8)):
        values = attention.defines(attention.tuning_for(head_dim, 1), bf16=bool(bf16), head_dim=head_dim, group=group)
        command = [nvcc, f"-arch={arch}", "-std=c++17", "-use_fast_math", "-Xptxas", "-v", "-cubin"]
        command += [*(f"-D{name}={value}" for name, value in values), str(attention.SOURCE)]
        done = subprocess.run([*command, "-o", tmp_path / "cubin"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr


def decode(arguments: dict[str, Any], tuning: attention.Tuning) -> torch.Tensor:
    names = ("q", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start")
    output = torch.full_like(arguments["q"], torch.nan, memory_format=torch.contiguous_format)
    attention.decode(*(arguments[name] for name in names), output, arguments["scale"], None, tuning=tuning)
    return output


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 33, 100])
@pytest.mark.parametrize("blocks", [1, 2])
def test_whatever_the_lengths_results_are_right_repeat_and_leave_no_part(blocks: int, num_rows: int) -> None:
    """A part that stays would be taken for the next launch's, by a block that looks before that is there."""
    device, draw = torch.device("cuda"), random.Random(f"{blocks} {num_rows}")
    lengths = tuple(draw.choice((0, 1, 15, 16, 17, 63, 64, 65, draw.randrange(5000))) for _ in range(num_rows))
    case = Case((1,) * num_rows, (*lengths[1:], 700), 10, 2, 128, slack=100)
    arguments = case.arguments(device, torch.float16, torch.Generator(device).manual_seed(num_rows))
    tuning = attention.Tuning(warps=4, stages=3, blocks=blocks)
    first = decode(arguments, tuning)
    assert relative_error(first, reference(*(to_float64(value) for value in arguments.values()))) < 1e-3
    for _ in range(50):
        assert torch.equal(decode(arguments, tuning), first)
    parts = attention.parts(arguments["q"].device, torch.cuda.current_stream(device).cuda_stream)
    assert bool((parts == -1).all())
