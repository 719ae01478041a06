"""The C kernel against float64; and that a row's bits depend on nothing but the row."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.cpu import compiler, int4_linear
from nybble.kernels.int4_weight import Int4Weight, random_int4_weight
from nybble.kernels.op import Spec

pytestmark = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def exact(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.double() @ weight.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def launch(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return int4_linear.c_launch(x, int4_linear.c_prepare(weight), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "group_size"),
    [
        (1, 32, 8, 32),
        (1, 1536, 264, 128),
        (2, 448, 64, 64),
        (3, 96, 40, 32),
        (4, 128, 32, 128),
        (7, 640, 136, 64),
        (13, 256, 24, 128),
        (33, 160, 100, 32),
        (101, 256, 72, 256),  # more rows than are kept at once
    ],
)
def test_agrees_with_float64(rows, in_features, out_features, group_size, dtype, generator):
    weight = random_int4_weight(out_features, in_features, group_size, dtype, generator=generator)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if rows % 2 else None
    expected = exact(x, weight, bias)
    tolerance = 1e-5 * expected.abs().max() + torch.finfo(dtype).eps / 2 * expected.abs()
    y = launch(x, weight, bias)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("rows", [1, 6])
def test_outliers_do_not_cancel_the_rest(rows, generator):
    weight = random_int4_weight(64, 512, 128, torch.float32, generator=generator)
    x = torch.randn(rows, 512, generator=generator)
    x[:, ::97] *= 1000
    expected = exact(x, weight, None)
    assert (launch(x, weight).double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_codes_and_zeros_at_their_limits():
    """Every pair of code and zero point, on values that fp32 holds exactly."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 2)  # [N = 16, K = 32]
    zeros = torch.arange(16, dtype=torch.uint8).view(1, 16)
    weight = Int4Weight(codes[:, ::2] | codes[:, 1::2] << 4, torch.full((1, 16), 0.5), zeros, 32)
    x = torch.eye(32)
    assert torch.equal(launch(x, weight), exact(x, weight, None).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_neither_its_neighbours_nor_the_threads(dtype, generator):
    weight = random_int4_weight(520, 512, 128, dtype, generator=generator)
    packed = int4_linear.c_prepare(weight)
    x = torch.randn(101, 512, generator=generator).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = int4_linear.c_launch(x, packed, None)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(int4_linear.c_launch(x, packed, None), together)
            for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 17), (90, 101)):
                assert torch.equal(int4_linear.c_launch(x[first:last], packed, None), together[first:last])
    finally:
        torch.set_num_threads(before)


def test_reads_nothing_that_it_did_not_write(monkeypatch, generator):
    weight = random_int4_weight(72, 256, 64, torch.bfloat16, generator=generator)
    x = torch.randn(5, 256, generator=generator).bfloat16()
    expected = launch(x, weight)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    assert torch.equal(launch(x, weight), expected)
    assert expected.isfinite().all()


def test_writes_nothing_outside_its_output(generator):
    weight = int4_linear.c_prepare(random_int4_weight(40, 64, 32, torch.float32, generator=generator))
    x = torch.randn(3, 64, generator=generator)
    y, scratch = torch.full((5, 40), 7.0), torch.full((3 * 66 + 16,), 7.0)
    struct = int4_linear.ctypes.addressof(weight.struct)
    inside = (y[1:].data_ptr(), scratch.data_ptr(), 3, 0)
    int4_linear.c_function()(struct, x.data_ptr(), None, *inside, None, 1)
    assert torch.equal(y[1:4], int4_linear.c_launch(x, weight, None))
    assert (y[0] == 7).all()
    assert (y[4] == 7).all()
    assert (scratch[3 * 66 :] == 7).all()


def test_takes_strided_rows_and_none_at_all(generator):
    weight = random_int4_weight(32, 64, 32, torch.float32, generator=generator)
    x = torch.randn(4, 128, generator=generator)
    assert torch.equal(launch(x[:, :64], weight), launch(x[:, :64].contiguous(), weight))
    assert launch(x[:0, :64], weight).shape == (0, 32)


def test_values_that_are_not_finite_stay_so(generator):
    weight = random_int4_weight(32, 64, 32, torch.float16, generator=generator)
    x = torch.randn(3, 64, generator=generator).half()
    x[0, 3], x[2, 40] = torch.inf, torch.nan
    y = launch(x, weight)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()
    assert y[2].isnan().all()


@pytest.mark.parametrize(
    ("device", "dtype", "group_size", "word"),
    [("cuda", torch.float32, 32, "CPUs"), ("cpu", torch.float64, 32, "float64"), ("cpu", torch.float32, 48, "48")],
)
def test_says_what_it_does_not_support(device, dtype, group_size, word):
    spec = Spec(device=torch.device(device), dtype=dtype, sizes={"group_size": group_size})
    assert word in int4_linear.c_why_not(spec)
