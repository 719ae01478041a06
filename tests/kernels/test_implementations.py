"""Every implementation against its reference in float64, on the operation's own cases.

On a CPU the Triton kernels run in Triton's interpreter. Whether they do is decided when triton is first imported, and
any test may have imported it before: so they run in one process of their own, started with TRITON_INTERPRET=1.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from nybble.core.errors import ConfigError
from nybble.kernels import int4_linear, triton
from nybble.kernels.check import OPS, TOLERANCE, measure, prepare, relative_error, supported
from nybble.kernels.op import Spec, bind

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = [(name, case) for name, op in OPS.items() for case in op.cases()]
ALL = [(name, case) for name, op in OPS.items() for case in op.cases(True)]
INTERPRETED = [(name, case) for name, case in SMALL if any(impl.name == "triton" for impl in OPS[name].impls)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), SMALL, ids=str)
def test_on_the_cpu(name, case, dtype):
    for impl in supported(name, case, dtype, CPU):
        assert measure(name, impl.name, case, dtype, CPU) <= TOLERANCE[dtype], impl.name


def test_the_cpu_has_what_it_should():
    """Guards the test above against checking nothing."""
    case = int4_linear.Case(1, 128, 64, 32)
    assert {impl.name for impl in supported("int4_linear", case, torch.bfloat16, CPU)} >= {"c", "torch"}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # the process starts now, with the variable
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield pool


# The interpreter adds and multiplies bf16 as if its bits were integers; on a GPU bf16 is tested below.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "case"), INTERPRETED, ids=str)
def test_triton_in_the_interpreter(interpreter, name, case, dtype):
    assert interpreter.submit(measure, name, "triton", case, dtype, CPU).result() <= TOLERANCE[dtype]


def read_sums(num_blocks: int, num_programs: int) -> tuple[int, int]:
    """What the kernel that measures bandwidth adds up, and what it should."""
    from nybble.kernels.triton.read import BLOCK, read

    source = torch.randint(-(2**31), 2**31, (num_blocks * BLOCK,), dtype=torch.int32)
    sums = torch.empty(num_programs, dtype=torch.int32)
    read(source, sums)
    return int(sums.sum(dtype=torch.int64)) % 2**32, int(source.sum(dtype=torch.int64)) % 2**32


@pytest.mark.parametrize(("num_blocks", "num_programs"), [(1, 1), (5, 8), (37, 8)])
def test_reading_for_bandwidth_misses_nothing(interpreter, num_blocks, num_programs):
    found, expected = interpreter.submit(read_sums, num_blocks, num_programs).result()
    assert found == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), ALL, ids=str)
def test_on_the_gpu(name, case, dtype):
    for impl in supported(name, case, dtype, CUDA):
        assert measure(name, impl.name, case, dtype, CUDA) <= TOLERANCE[dtype], impl.name


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), SMALL, ids=str)
def test_repeats_bit_for_bit_and_in_a_graph(name, case):
    """Twice the same bits, and the same again from a captured graph: no atomics, no reads on the host."""
    for impl in supported(name, case, torch.float16, CUDA):
        arguments = case.arguments(CUDA, torch.float16, torch.Generator(CUDA).manual_seed(3))
        prepare(impl, case, arguments)
        results = [impl.launch(*arguments.values()) for _ in range(2)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(impl.launch(*arguments.values()))
        graph.replay()
        torch.cuda.synchronize()
        first, *others = [r if isinstance(r, tuple) else (r,) for r in results]
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert (a is None and b is None) or torch.equal(a, b), impl.name


def test_a_wrong_element_shows():
    expected = torch.ones(100, dtype=torch.float64)
    assert relative_error(expected.clone(), expected) == 0
    wrong = expected.clone()
    wrong[7] = 2
    assert relative_error(wrong, expected) == pytest.approx(0.1)
    wrong[7] = torch.nan
    assert relative_error(wrong, expected) == float("inf")


def test_triton_refuses_in_words(monkeypatch):
    spec = Spec(device=CPU, dtype=torch.float16, sizes={"group_size": 128})
    with pytest.raises(ConfigError, match=r"int4_linear=triton cannot run here: Triton kernels run on CUDA GPUs"):
        bind(int4_linear.OP, spec, {"int4_linear": "triton"})
    triton.missing_tools.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    try:
        reason = triton.missing_tools()
        assert reason is not None
        assert "C compiler" in reason or "not installed" in reason
    finally:
        triton.missing_tools.cache_clear()
