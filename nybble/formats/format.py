"""`Format`: how a checkpoint stores one linear layer.

Owns: which tensors there are, their shapes and types, how they are cut, and their repack into what kernels take.
Does not know: model names, parallel styles, which kernel multiplies.

A linear is y = x Wᵀ with W [out, in]. Each stored tensor says which of the two axes its dimensions follow and how many
logical rows or columns one stored element covers. That is enough for one function, `StoredTensor.region`, to put q, k
and v side by side into one fused tensor, and to cut a linear for several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from nybble.core.errors import UnsupportedError
from nybble.kernels.int4_weight import Int4Weight

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)

RandomFill = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
"""Shape and generator → values that keep activations near unit size; for `load_format="dummy"`."""


@dataclass(frozen=True)
class Dim:
    """One dimension of a stored tensor: the axis of W it follows; how many logical elements a stored one covers."""

    axis: Literal["out", "in"]
    covers: int = 1


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a linear, as it lies in the checkpoint."""

    name: str
    dims: tuple[Dim, ...]
    dtypes: tuple[torch.dtype, ...]
    random: RandomFill
    optional: bool = False

    def region(self, *, out: range, in_: range) -> tuple[slice, ...]:
        """Where the rows `out` and the columns `in_` of W lie in this tensor.

        Raises:
            UnsupportedError: a border would cut through a stored element.
        """
        slices = []
        for dim in self.dims:
            span = out if dim.axis == "out" else in_
            if span.start % dim.covers or span.stop % dim.covers:
                raise UnsupportedError(
                    f"{self.name}: {dim.axis}put features {span.start}…{span.stop} cannot be stored, because one "
                    f"element covers {dim.covers}; sizes must be multiples of {dim.covers}"
                )
            slices.append(slice(span.start // dim.covers, span.stop // dim.covers))
        return tuple(slices)

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return tuple(s.stop for s in self.region(out=range(out_features), in_=range(in_features)))


class Format(Protocol):
    """What the loader and `Linear` need of a format."""

    @property
    def name(self) -> str: ...

    def tensors(self, in_features: int, *, bias: bool) -> tuple[StoredTensor, ...]:
        """The tensors of one linear; `bias` tells whether the model's definition has one."""
        ...

    def repack(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Int4Weight | torch.Tensor:
        """Turn the stored tensors (each complete, on its device) into a weight for kernels that compute in `dtype`.

        Raises:
            UnsupportedError: the values need something nybble does not do.
        """
        ...


def bias_tensor(*, optional: bool = False) -> StoredTensor:
    return StoredTensor(name="bias", dims=(Dim("out"),), dtypes=FLOAT_TYPES, random=normal(0.02), optional=optional)


def normal(deviation: float) -> RandomFill:
    return lambda shape, generator: torch.randn(shape, generator=generator, device=generator.device) * deviation


def constant(value: int) -> RandomFill:
    return lambda shape, generator: torch.full(shape, value, dtype=torch.int32, device=generator.device)


def random_codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Eight random 4-bit codes an element, 0 replaced by 8.

    Around a zero point of 8 their mean is 0 then; any other mean adds up over a layer's inputs, and over the layers of
    a large model it overflows fp16.
    """
    codes: torch.Tensor = torch.randint(
        -(2**31), 2**31, shape, generator=generator, device=generator.device, dtype=torch.int32
    )
    is_zero = 0x11111111 & ~(codes | codes >> 1 | codes >> 2 | codes >> 3)
    return codes | is_zero << 3


def random_scales(in_features: int) -> RandomFill:
    """Scales that give W, with codes of standard deviation 4.2, a variance near 1 / in_features."""
    typical = 1 / (4.2 * in_features**0.5)

    def fill(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        uniform = torch.rand(shape, generator=generator, device=generator.device)
        return uniform.mul_(0.5).add_(0.75).mul_(typical)

    return fill
