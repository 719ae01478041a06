"""The C kernels of single rows: any row alone or among others, extreme and not finite values."""

from collections.abc import Callable

import pytest
import torch

from nybble.kernels import rms_norm, rotary, silu_mul
from nybble.kernels.check import relative_error
from nybble.kernels.cpu import compiler, rows

pytestmark = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 48, 272, 5120])
def test_a_norm_adds_rounds_and_norms(size: int, dtype: torch.dtype) -> None:
    x, residual, weight = (
        normal(7, size, dtype=dtype),
        normal(7, size, dtype=dtype, scale=30),
        normal(size, dtype=dtype),
    )
    y, total = rows.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(total, x + residual), "the next residual, rounded"
    exact, _ = rms_norm.reference(total.double(), weight.double(), 1e-6, None)
    assert relative_error(y, exact) < 2 * torch.finfo(dtype).eps
    alone, _ = rows.rms_norm(x[3:4], weight, 1e-6, residual[3:4])
    assert torch.equal(alone[0], y[3])


def test_a_norm_takes_rows_that_lie_apart() -> None:
    wide = normal(5, 96)
    part, weight = wide[:, 32:64], normal(32)
    y, total = rows.rms_norm(part, weight, 1e-6, None)
    assert total is part
    assert relative_error(y, rms_norm.reference(part, weight, 1e-6, None)[0]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_at_both_ends(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -90.0, -20.0, -1.0, -0.0, 0.0, 1e-3, 1.0, 20.0, 90.0, 1e4]).to(dtype).repeat(16)
    gate_up = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    result = rows.silu_mul(gate_up)
    exact = silu_mul.reference(gate_up.double())
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * 1e4
    assert relative_error(result, exact) < 2 * torch.finfo(dtype).eps


def test_a_turn_leaves_what_is_not_turned() -> None:
    q, k = normal(4, 3, 64), normal(4, 1, 64)
    positions = torch.tensor([0, 5, 2, 9])
    angles = torch.arange(10).unsqueeze(1) * torch.logspace(0, -2, 16)
    table = torch.cat((angles.cos(), angles.sin()), -1)
    expected = [x.clone() for x in (q, k)]
    rotary.reference(*expected, positions, table)
    before = q[..., 32:].clone()
    rows.rotary(q, k, positions, table)
    for found, wanted in zip((q, k), expected, strict=True):
        assert relative_error(found, wanted) < 1e-6
    assert torch.equal(q[..., 32:], before)


def silu_of(x: torch.Tensor) -> torch.Tensor:
    return rows.silu_mul(torch.cat((x, torch.ones_like(x)), dim=1))


@pytest.mark.parametrize("function", [silu_of, lambda x: rows.rms_norm(x, torch.ones(32), 1e-6, None)[0]])
def test_nan_shows(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = normal(2, 32)
    x[1, 7] = torch.nan
    result = function(x)
    assert result[1, 7].isnan()
    assert result[0].isfinite().all()


def test_a_token_without_a_slot_is_not_kept() -> None:
    k, v = normal(3, 2, 5), normal(3, 2, 5) + 1
    caches = [torch.zeros(2, 2, 8, 5) for _ in range(2)]
    rows.kv_write(k, v, *caches, torch.tensor([9, -1, 0]))
    for cache, new in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[1, :, 1], new[0])
        assert torch.equal(cache[0, :, 0], new[2])
        assert cache.count_nonzero() == 20


def test_integers_are_of_the_width_that_c_reads() -> None:
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"torch\.int32"):
        rows.rotary(normal(1, 1, 32), normal(1, 1, 32), one, torch.ones(2, 32))
    with pytest.raises(AssertionError, match=r"torch\.int32"):
        rows.kv_write(*(normal(1, 1, 16) for _ in range(2)), *(torch.zeros(1, 1, 8, 16) for _ in range(2)), one)
