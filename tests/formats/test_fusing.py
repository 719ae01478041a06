"""Where the parts of a fused linear lie in its stored tensors, and that q, k and v side by side stay themselves."""

import math
import re
from typing import Any

import pytest
import torch

from nybble.core.errors import UnsupportedError
from nybble.formats import from_hf
from nybble.formats.awq import Awq
from nybble.formats.dense import Dense
from nybble.formats.format import Dim, Format, StoredTensor, constant
from nybble.formats.gptq import Gptq
from nybble.layers.linear import Linear
from nybble.layers.target import Target

IN = 128
PARTS = {"q_proj": 64, "k_proj": 16, "v_proj": 24}
AWQ = {"quant_method": "awq", "group_size": 32}
GPTQ = {"quant_method": "gptq", "group_size": 32}
TARGET = Target(device=torch.device("cpu"), dtype=torch.float32)


def stored(*dims: Dim) -> StoredTensor:
    return StoredTensor(name="t", dims=dims, dtypes=(torch.int32,), random=constant(0))


def test_regions() -> None:
    both = {"out": range(64, 80), "in_": range(32, 96)}
    assert stored(Dim("out"), Dim("in")).region(**both) == (slice(64, 80), slice(32, 96))
    assert stored(Dim("in"), Dim("out", 8)).region(**both) == (slice(32, 96), slice(8, 10))
    assert stored(Dim("in", 32), Dim("out", 8)).region(**both) == (slice(1, 3), slice(8, 10))
    assert stored(Dim("out")).region(**both) == (slice(64, 80),)


@pytest.mark.parametrize(
    ("out", "in_"), [((4, 16), (0, 64)), ((8, 20), (0, 64)), ((8, 16), (0, 48)), ((8, 16), (16, 64))]
)
def test_a_border_through_a_stored_element_is_refused(out: tuple[int, int], in_: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match=r"t: (in|out)put features .* one element covers (8|32)"):
        stored(Dim("in", 32), Dim("out", 8)).region(out=range(*out), in_=range(*in_))


@pytest.mark.parametrize("fmt", [Dense(), Awq(32), Awq(-1), Gptq(32), Gptq(-1)], ids=lambda f: f"{f.name}")
def test_parts_tile_every_stored_tensor(fmt: Format) -> None:
    """Each element with output features belongs to exactly one part; what has none is the same for all parts."""
    for tensor in fmt.tensors(IN, bias=True):
        shape = tensor.shape(sum(PARTS.values()), IN)
        count, end = torch.zeros(shape, dtype=torch.int64), 0
        for size in PARTS.values():
            end += size
            region = count[tensor.region(out=range(end - size, end), in_=range(IN))]
            assert tuple(region.shape) == tensor.shape(size, IN)
            region += 1
        has_out = any(dim.axis == "out" for dim in tensor.dims)
        assert (count == (1 if has_out else len(PARTS))).all(), tensor.name


def filled(parts: dict[str, int], settings: dict[str, Any], bias: bool, given: dict[str, torch.Tensor]) -> Linear:
    """A finished linear, its slots filled from `given` in an order that is nobody's."""
    linear = Linear(TARGET, IN, parts, bias=bias)
    slots = linear.slots("attn.qkv", from_hf({"quantization_config": settings}), given or None)
    for name in sorted(slots, key=lambda name: name[::-1]):
        if name not in given:
            shape, generator = slots[name].shape, torch.Generator().manual_seed(math.prod(map(ord, name)) % 2**31)
            given[name] = slots[name].random(shape, generator)
        slots[name].accept(given[name])
    linear.finish()
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, AWQ, AWQ | {"zero_point": False}, GPTQ], ids=["dense", "awq", "awq-no-zeros", "gptq"]
)
def test_fused_parts_give_what_each_gives_alone(settings: dict[str, Any], bias: bool) -> None:
    given: dict[str, torch.Tensor] = {}
    fused = filled(PARTS, settings, bias, given)
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(0))
    outputs = fused(x).split(list(PARTS.values()), dim=-1)
    for (part, size), output in zip(PARTS.items(), outputs, strict=True):
        own = {name: tensor for name, tensor in given.items() if f".{part}." in name}
        torch.testing.assert_close(output, filled({part: size}, settings, bias, own)(x), atol=1e-5, rtol=0)
    assert len({round(float(output.detach().abs().mean()), 6) for output in outputs}) == 3


def test_parts_in_two_formats_are_refused() -> None:
    names = ["attn.q_proj.qweight", "attn.k_proj.weight", "attn.v_proj.qweight"]
    with pytest.raises(UnsupportedError, match=re.escape("attn.q_proj: awq, attn.k_proj: dense, attn.v_proj: awq")):
        Linear(TARGET, IN, PARTS).slots("attn.qkv", from_hf({"quantization_config": AWQ}), names)


def test_sizes_that_cannot_be_stored_are_refused_with_the_linears_name() -> None:
    with pytest.raises(UnsupportedError, match=r"attn\.q_proj\.qweight: output features 0…12 .* multiples of 8"):
        Linear(TARGET, IN, {"q_proj": 12}).slots("attn.qkv", from_hf({"quantization_config": AWQ}), None)
    quantization = from_hf({"quantization_config": AWQ | {"group_size": 64}})
    with pytest.raises(UnsupportedError, match=r"attn\.q_proj\.qzeros: input features 0…96 .* multiples of 64"):
        Linear(TARGET, 96, {"q_proj": 16}).slots("attn.qkv", quantization, None)
