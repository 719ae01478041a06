"""GPTQ, 4 bit, symmetric or not, without activation order.

Stored, with group size g:
    qweight  int32 [in/8, out]     eight input features an element, the first one in the lowest bits
    qzeros   int32 [in/g, out/8]   eight output features an element, the first one in the lowest bits
    scales   float [in/g, out]     W = (code − zero) · scale
    g_idx    int32 [in]            group of each input feature; only k // g is accepted

The first checkpoint format ("gptq") stores zero − 1, modulo 16; "gptq_v2" stores the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nybble.core.errors import UnsupportedError
from nybble.formats.format import (
    FLOAT_TYPES,
    Dim,
    StoredTensor,
    bias_tensor,
    constant,
    random_codes,
    random_scales,
)
from nybble.kernels.int4_weight import Int4Weight


@dataclass(frozen=True)
class Gptq:
    group_size: int  # −1: one group over all input features
    zeros_minus_one: bool = True
    name: str = "gptq"

    def tensors(self, in_features: int, *, bias: bool) -> tuple[StoredTensor, ...]:
        group = in_features if self.group_size == -1 else self.group_size

        def trivial_groups(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.arange(shape[0], dtype=torch.int32, device=generator.device) // group

        return (
            StoredTensor(name="qweight", dims=(Dim("in", 8), Dim("out")), dtypes=(torch.int32,), random=random_codes),
            StoredTensor(
                name="qzeros",
                dims=(Dim("in", group), Dim("out", 8)),
                dtypes=(torch.int32,),
                random=constant(0x77777777 if self.zeros_minus_one else 0x88888888 - 2**32),
            ),
            StoredTensor(
                name="scales",
                dims=(Dim("in", group), Dim("out")),
                dtypes=FLOAT_TYPES,
                random=random_scales(in_features),
            ),
            StoredTensor(
                name="g_idx",
                dims=(Dim("in"),),
                dtypes=(torch.int32, torch.int64),
                random=trivial_groups,
                optional=True,
            ),
            # Writers add a bias of zeros to every linear, also where the model has none.
            bias_tensor(optional=not bias),
        )

    def repack(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Int4Weight:
        qweight, scales = raw["qweight"], raw["scales"].to(dtype)
        in_features = qweight.shape[0] * 8
        group = in_features // len(scales)
        if "g_idx" in raw:
            _check_trivial(raw["g_idx"], group)
        # Little-endian bytes of [out, in/8] int32 hold input features 2j (low nibble) and 2j + 1: the canonical order.
        packed = qweight.t().contiguous().view(torch.uint8)
        octets = raw["qzeros"].contiguous().view(torch.uint8)  # [in/g, out/2]
        zeros = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
        if self.zeros_minus_one:
            zeros = (zeros + 1) & 15
        return Int4Weight(qweight=packed, scales=scales, zeros=zeros, group_size=group)


def _check_trivial(g_idx: torch.Tensor, group: int) -> None:
    expected = torch.arange(len(g_idx), device=g_idx.device) // group
    if not torch.equal(g_idx.long(), expected):
        raise UnsupportedError(
            "g_idx orders input features by activation; nybble runs GPTQ checkpoints made with desc_act = false"
        )
