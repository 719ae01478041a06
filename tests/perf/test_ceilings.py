"""Ceilings: plausible, and the rooflines drawn from them."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nybble.kernels.op import Cost
from nybble.perf import ceilings
from nybble.perf.ceilings import Ceilings, measure_ceilings


def test_the_slower_of_reading_and_computing_is_the_roofline() -> None:
    machine = Ceilings(read_bytes_per_second=2e9, flops_per_second=1e12, dtype="float16", how="")
    assert machine.seconds(Cost(4_000_000_000, 10)) == 2.0
    assert machine.seconds(Cost(8, 3_000_000_000_000)) == 3.0


def test_a_cpu_is_measured_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 128)
    monkeypatch.setattr(ceilings, "CPU_READ_BYTES", 16 << 20)
    monkeypatch.setattr(ceilings, "CPU_SECONDS", 0.01)
    found = measure_ceilings(torch.device("cpu"), torch.bfloat16)
    assert 1e8 < found.read_bytes_per_second < 1e12
    assert 1e8 < found.flops_per_second < 1e14
    assert found.dtype in ("float32", "bfloat16")
    assert "0.02 GB summed" in found.how
    assert "128³" in found.how


@pytest.mark.parametrize(
    ("fastest", "dtype"), [("torch's float32", "float32"), ("torch's bfloat16", "bfloat16"), ("int4", "bfloat16")]
)
def test_the_fastest_product_is_a_cpus_ceiling(fastest: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step of the others would be faster than its roofline."""
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 128)
    monkeypatch.setattr(ceilings, "CPU_READ_BYTES", 4 << 20)
    monkeypatch.setattr(ceilings, "_product", lambda n, dtype, device: lambda: f"torch's {ceilings._name(dtype)}")
    monkeypatch.setattr(ceilings, "_int4_product", lambda *_: lambda: "int4")
    monkeypatch.setattr(ceilings, "_least_seconds", lambda call: 1e-3 if str(call()) == fastest else 2e-3)
    found = measure_ceilings(torch.device("cpu"), torch.bfloat16)
    assert found.flops_per_second == 2 * 128**3 / 1e-3
    assert found.dtype == dtype
    assert found.int4_flops_per_second == 2 * 128**3 / (1e-3 if fastest == "int4" else 2e-3)
    assert f"the fastest 128³ product, {'nybble' if fastest == 'int4' else 'torch'}'s" in found.how
    assert found.how.count("TFLOP/s") == 2, "the slower ones are said too"


def test_the_int4_product_is_the_one_that_it_counts_as() -> None:
    result = ceilings._int4_product(128, torch.bfloat16, torch.device("cpu"))()
    assert isinstance(result, torch.Tensor)
    assert result.shape == (128, 128)
    assert result.isfinite().all()


def test_buffers_hold_no_constant_and_no_nan() -> None:
    buffer = ceilings._buffer(9 << 20, torch.device("cpu"))
    assert buffer.nbytes == 8 << 20
    assert len(buffer[:1000].unique()) > 900
    assert buffer.view(torch.float32).isfinite().all()


@pytest.mark.slow
def test_a_cpu_is_measured_in_seconds() -> None:
    begin = time.perf_counter()
    measure_ceilings(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begin < 20  # 5 on an idle machine


@pytest.mark.gpu
def test_a_gpu_reaches_its_ceilings() -> None:
    device = torch.device("cuda")
    measure_ceilings(device, torch.float16)  # compiles
    begin = time.perf_counter()
    found = measure_ceilings(device, torch.float16)
    assert time.perf_counter() - begin < 2
    copy_bytes_per_second = _copy_bytes_per_second(device)
    assert found.read_bytes_per_second > copy_bytes_per_second, found
    assert found.flops_per_second > 1e13
    assert torch.cuda.memory_allocated(device) < 1 << 30


def run_python(program: str, tmp_path: Path, **variables: str) -> str:
    """In a process of its own: Triton reads its environment when it is imported."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables = {**inherited, "TRITON_CACHE_DIR": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_read_kernel_adds_up_every_element_once(tmp_path: Path) -> None:
    program = """
import torch
from nybble.kernels.triton.read import BLOCK, read
for num_blocks, num_programs in ((7, 3), (3, 3), (2, 5)):
    source = torch.randint(-1000, 1000, (num_blocks * BLOCK,), dtype=torch.int32)
    sums = torch.empty(num_programs, dtype=torch.int32)
    read(source, sums)
    print(sums.sum().item() == source.sum().item())
"""
    assert run_python(program, tmp_path, TRITON_INTERPRET="1").split() == ["True"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_read_kernel_compiles_to_wide_loads(capability: int, tmp_path: Path) -> None:
    program = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nybble.kernels.triton.read import BLOCK, read_kernel
types = {{"source_ptr": "*i32", "sums_ptr": "*i32", "num_blocks": "i32"}}
aligned = {{(index,): [["tt.divisibility", 16]] for index in (0, 1)}}
source = ASTSource(read_kernel, types, {{"BLOCK": BLOCK}}, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options={{"num_warps": 8}})
print(compiled.asm["ptx"])
"""
    ptx = run_python(program, tmp_path)
    assert ptx.count("ld.global") == ptx.count("ld.global.v4.b32") == 4


@pytest.mark.gpu
def test_the_read_kernel_reads_all_of_it() -> None:
    from nybble.kernels.triton.read import BLOCK, read

    source = torch.randint(-1000, 1000, (37 * BLOCK,), dtype=torch.int32, device="cuda")
    sums = torch.empty(5, dtype=torch.int32, device="cuda")
    read(source, sums)
    assert sums.sum().item() == source.sum().item()


def _copy_bytes_per_second(device: torch.device) -> float:
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / ceilings.median_seconds(lambda: target.copy_(source), device)
