"""The C product of 16-bit weights against torch in float64, and the 16-bit conversions bit by bit."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.cpu import compiler, dense_linear
from nybble.kernels.op import Spec

pytestmark = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1, 16, 1), (1, 528, 103), (2, 64, 35), (3, 96, 64), (4, 80, 6), (9, 256, 70)]
)
def test_agrees_with_float64(rows, k, n, dtype, generator):
    x = torch.randn(rows, k, generator=generator).to(dtype)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)
    expected = x.double() @ weight.double().T
    y = dense_linear.launch(x, weight, torch.float32)
    assert (y.double() - expected).abs().max() <= 1e-6 * (x.double().abs() @ weight.double().abs().T).max()
    assert torch.equal(dense_linear.launch(x, weight), y.to(dtype))


def test_a_row_depends_on_neither_its_neighbours_nor_the_threads(generator):
    x = torch.randn(11, 512, generator=generator).bfloat16()
    weight = torch.randn(600, 512, generator=generator).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = dense_linear.launch(x, weight, torch.float32)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for first, last in ((0, 11), (0, 1), (1, 3), (3, 6), (6, 10)):
                assert torch.equal(dense_linear.launch(x[first:last], weight, torch.float32), together[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_finite_half_is_read_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.where(every.isfinite(), every, 0).view(-1, 16)
    y = dense_linear.launch(x, torch.eye(16, dtype=dtype), torch.float32)
    assert torch.equal(y, x.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_as_torch_rounds(dtype, generator):
    """Sums over the whole range: subnormal, at ties, too large, and not a number."""
    exponents = torch.randint(-13, 16, (4096, 1), generator=generator)
    x = (torch.randn(4096, 16, generator=generator) * 2.0**exponents).to(dtype)
    x[::64, 0], x[1::64, 0], x[2::64, 0] = torch.inf, -torch.inf, torch.nan
    x[3::64] = 0
    weight = torch.tensor([1.0, 1.0, -(2.0**-12), 2.0**-11, 1.5, 0, 0, 0] * 2 + [0.0] * 16).view(2, 16).to(dtype)
    for scale in (1.0, 2.0**-10):
        wide = dense_linear.launch(x, weight * scale, torch.float32)
        narrow = dense_linear.launch(x, weight * scale, dtype)
        assert torch.equal(narrow.nan_to_num(nan=12345.0), wide.to(dtype).nan_to_num(nan=12345.0))


@pytest.mark.parametrize(
    ("device", "dtype", "k", "word"),
    [("cuda", torch.bfloat16, 16, "CPUs"), ("cpu", torch.float32, 16, "float32"), ("cpu", torch.float16, 24, "24")],
)
def test_says_what_it_does_not_support(device, dtype, k, word):
    assert word in dense_linear.why_not(Spec(device=torch.device(device), dtype=dtype, sizes={"in_features": k}))
