"""The C attention beyond the operation's cases: what a result may not depend on, and what it must not hide."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nybble.kernels.attention import Case, reference
from nybble.kernels.check import relative_error, to_float64
from nybble.kernels.cpu import attention, compiler

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(compiler.why_not() is not None, reason="no C compiler")


def arguments(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    return case.arguments(CPU, dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [20, 33])
def test_more_query_heads_of_a_kv_head_than_a_piece_takes(heads: int) -> None:
    given = arguments(Case((3, 1), (40, 7), heads, 1, 64))
    exact = reference(*(to_float64(value) for value in given.values()))
    assert relative_error(attention.launch(*given.values()), exact) < 1e-6


def test_a_token_s_result_depends_on_nobody_else() -> None:
    """The same bits whether a prompt comes whole or in chunks, alone or beside others, by one thread or by two."""
    whole = arguments(Case((50,), (50,), 6, 2, 64), torch.bfloat16)
    expected = attention.launch(**whole)
    for begin, end in ((0, 1), (0, 13), (13, 50), (49, 50)):
        part = whole | {
            "q": whole["q"][begin:end],
            "seq_lens": torch.tensor([end], dtype=torch.int32),
            "query_start": torch.tensor([0, end - begin], dtype=torch.int32),
            "min_query_len": end - begin,
            "max_query_len": end - begin,
        }
        assert torch.equal(attention.launch(**part), expected[begin:end])
    twice = whole | {
        "q": torch.cat((whole["q"], whole["q"][:20])),
        "block_tables": whole["block_tables"].repeat(2, 1),
        "seq_lens": torch.tensor([50, 20], dtype=torch.int32),
        "query_start": torch.tensor([0, 50, 70], dtype=torch.int32),
    }
    assert torch.equal(attention.launch(**twice), torch.cat((expected, expected[:20])))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(attention.launch(**arguments(Case((64,) * 4, (64,) * 4, 8, 2, 64))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    given = arguments(Case((1, 5), (100, 60), 4, 2, 64))
    given["q"] *= 300  # scores of hundreds: most weights are 0, the largest is 1
    exact = reference(*(to_float64(value) for value in given.values()))
    result = attention.launch(**given)
    assert result.isfinite().all()
    assert relative_error(result, exact) < 1e-5


@pytest.mark.parametrize("name", ["q", "key_cache", "value_cache"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    """Broken weights must end a request with an error, so nothing may turn them into numbers."""
    given = arguments(Case((1,), (20,), 2, 1, 64))
    if name == "q":
        given["q"] = given["q"].clone()
        given["q"][0, 0, 3] = bad
    else:
        given[name][given["block_tables"][0, 0], 0, 5, 3] = bad
    assert not attention.launch(**given).isfinite().all()


def test_a_window_bounds_what_is_read() -> None:
    """Keys before the window may have been overwritten by anything."""
    given = arguments(replace(Case((1,), (70,), 4, 2, 64), sliding_window=20))
    expected = attention.launch(**given)
    for name in ("key_cache", "value_cache"):
        given[name][given["block_tables"][0, :3].long()] = torch.nan  # keys 0 … 47
    assert torch.equal(attention.launch(**given), expected)


@pytest.mark.parametrize("name", ["block_tables", "seq_lens", "query_start"])
def test_integers_are_of_the_width_that_c_reads(name: str) -> None:
    given = arguments(Case((1, 1), (20, 9), 2, 1, 64))
    given[name] = given[name].long()
    with pytest.raises(AssertionError, match=r"torch\.int64"):
        attention.launch(**given)
