"""AWQ and GPTQ repacks against dequantizations written here in numpy, read off the formats' public descriptions."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from nybble.core.errors import UnsupportedError
from nybble.formats.awq import ROWS_AT_ONCE, Awq
from nybble.formats.format import Format
from nybble.formats.gptq import Gptq
from nybble.kernels.int4_weight import Int4Weight

IN, OUT = 256, 48
Arrays = dict[str, np.ndarray]


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Eight random codes an element, the sign bit included."""
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def awq_arrays(group: int, *, zero_point: bool = True, in_features: int = IN) -> Arrays:
    rng = np.random.default_rng(group)
    groups = in_features // group
    arrays = {
        "qweight": random_words(rng, in_features, OUT // 8),
        "scales": rng.uniform(0.001, 0.1, (groups, OUT)).astype(np.float16),
    }
    return arrays | ({"qzeros": random_words(rng, groups, OUT // 8)} if zero_point else {})


def gptq_arrays(group: int, *, symmetric: bool = False, zeros_minus_one: bool = True) -> Arrays:
    rng = np.random.default_rng(group)
    groups = IN // group
    qzeros = random_words(rng, groups, OUT // 8)
    if symmetric:
        qzeros[:] = 0x77777777 if zeros_minus_one else np.uint32(0x88888888).astype(np.int32)
    return {
        "qweight": random_words(rng, IN // 8, OUT),
        "qzeros": qzeros,
        "scales": rng.uniform(0.001, 0.1, (groups, OUT)).astype(np.float16),
        "g_idx": (np.arange(IN) // group).astype(np.int32),
    }


def awq_codes(words: np.ndarray) -> np.ndarray:
    """AutoAWQ shifts by these amounts to get the eight output features of a word in their order."""
    shifts = np.array([0, 16, 4, 20, 8, 24, 12, 28])
    return (words[..., None].astype(np.int64) >> shifts & 15).reshape(len(words), -1)


def along_rows(words: np.ndarray) -> np.ndarray:
    return np.stack([words.astype(np.int64) >> 4 * i & 15 for i in range(8)], axis=1).reshape(-1, words.shape[1])


def along_columns(words: np.ndarray) -> np.ndarray:
    return along_rows(words.T).T


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[out, in], one element at a time as the definition says it."""
    group = len(codes) // len(scales)
    k = np.arange(len(codes))
    return ((codes - zeros[k // group]).astype(np.float32) * scales.astype(np.float32)[k // group]).T


def repack(fmt: Format, arrays: Arrays, dtype: torch.dtype = torch.float32) -> Int4Weight:
    weight = fmt.repack({name: torch.from_numpy(array) for name, array in arrays.items()}, dtype)
    assert isinstance(weight, Int4Weight)
    return weight


@pytest.mark.parametrize("zero_point", [True, False], ids=["zeros", "no-zeros"])
@pytest.mark.parametrize("group", [32, 64, 128, IN])
def test_awq(group: int, zero_point: bool) -> None:
    arrays = awq_arrays(group, zero_point=zero_point)
    weight = repack(Awq(group, zero_point=zero_point), arrays)
    zeros = awq_codes(arrays["qzeros"]) if zero_point else np.full(arrays["scales"].shape, 8)
    expected = dequantized(awq_codes(arrays["qweight"]), zeros, arrays["scales"])
    np.testing.assert_array_equal(weight.dequantize(torch.float32).numpy(), expected)
    assert weight.group_size == group


def test_awq_in_several_pieces() -> None:
    """More rows than are unpacked in one go, and a rest."""
    arrays = awq_arrays(128, in_features=2 * ROWS_AT_ONCE + 128)
    expected = dequantized(awq_codes(arrays["qweight"]), awq_codes(arrays["qzeros"]), arrays["scales"])
    np.testing.assert_array_equal(repack(Awq(128), arrays).dequantize(torch.float32).numpy(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zeros_minus_one", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("group", [32, 64, 128, IN])
def test_gptq(group: int, zeros_minus_one: bool, symmetric: bool) -> None:
    arrays = gptq_arrays(group, symmetric=symmetric, zeros_minus_one=zeros_minus_one)
    weight = repack(Gptq(group, zeros_minus_one=zeros_minus_one), arrays)
    zeros = (along_columns(arrays["qzeros"]) + zeros_minus_one) % 16
    assert not symmetric or (zeros == 8).all()
    expected = dequantized(along_rows(arrays["qweight"]), zeros, arrays["scales"])
    np.testing.assert_array_equal(weight.dequantize(torch.float32).numpy(), expected)
    assert weight.group_size == group


def test_gptq_v1_stores_a_zero_of_0_as_15() -> None:
    arrays = gptq_arrays(64) | {"qzeros": np.full((4, OUT // 8), -1, dtype=np.int32)}
    assert not repack(Gptq(64), arrays).zeros.any()


def test_gptq_needs_no_group_indices() -> None:
    arrays = gptq_arrays(64)
    with_indices = repack(Gptq(64), arrays)
    del arrays["g_idx"]
    assert torch.equal(repack(Gptq(64), arrays).dequantize(torch.float32), with_indices.dequantize(torch.float32))


def swapped(g_idx: np.ndarray) -> np.ndarray:
    g_idx = g_idx.copy()
    g_idx[[0, -1]] = g_idx[[-1, 0]]
    return g_idx


@pytest.mark.parametrize("change", [swapped, np.flip, lambda g_idx: g_idx + 1], ids=["swapped", "flipped", "shifted"])
def test_activation_order_is_refused(change: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = gptq_arrays(64)
    arrays["g_idx"] = change(arrays["g_idx"]).copy()
    with pytest.raises(UnsupportedError, match=r"g_idx .*activation.*desc_act = false"):
        repack(Gptq(64), arrays)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("fmt", "arrays"), [(Awq(64), awq_arrays(64)), (Gptq(64), gptq_arrays(64))], ids=["awq", "gptq"]
)
def test_scales_are_cast_to_the_compute_type(fmt: Format, arrays: Arrays, dtype: torch.dtype) -> None:
    weight = repack(fmt, arrays, dtype)
    assert torch.equal(weight.scales, torch.from_numpy(arrays["scales"]).to(dtype))


@pytest.mark.parametrize(
    "fmt", [Awq(32), Awq(-1), Awq(64, zero_point=False), Gptq(32), Gptq(-1, zeros_minus_one=False)]
)
def test_dummy_tensors_make_a_weight_of_unit_gain(fmt: Format) -> None:
    generator = torch.Generator().manual_seed(1)
    stored = {t.name: t for t in fmt.tensors(IN, bias=False) if not t.optional}
    raw = {name: tensor.random(tensor.shape(OUT, IN), generator) for name, tensor in stored.items()}
    weight = fmt.repack(raw, torch.float32)
    assert isinstance(weight, Int4Weight)
    assert (weight.zeros == 8).all()
    assert weight.dequantize(torch.float32).std() * IN**0.5 == pytest.approx(1, rel=0.1)


def stored_shapes(fmt: Format, **settings: Any) -> Mapping[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape(OUT, IN) for tensor in fmt.tensors(IN, **settings)}


def test_stored_shapes() -> None:
    assert stored_shapes(Awq(64), bias=True) == {
        "qweight": (IN, OUT // 8),
        "qzeros": (IN // 64, OUT // 8),
        "scales": (IN // 64, OUT),
        "bias": (OUT,),
    }
    assert stored_shapes(Gptq(-1), bias=False) == {
        "qweight": (IN // 8, OUT),
        "qzeros": (1, OUT // 8),
        "scales": (1, OUT),
        "g_idx": (IN,),
        "bias": (OUT,),
    }
