"""Dense linears: `weight` [out, in] in a float type, cast to the compute type while loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nybble.formats.format import FLOAT_TYPES, Dim, StoredTensor, bias_tensor, normal


@dataclass(frozen=True)
class Dense:
    name: str = "dense"

    def tensors(self, in_features: int, *, bias: bool) -> tuple[StoredTensor, ...]:
        weight = StoredTensor(
            name="weight", dims=(Dim("out"), Dim("in")), dtypes=FLOAT_TYPES, random=normal(in_features**-0.5)
        )
        return (weight, bias_tensor()) if bias else (weight,)

    def repack(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return raw["weight"].to(dtype)
