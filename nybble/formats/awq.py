"""AWQ in AutoAWQ's `gemm` layout, 4 bit.

Stored, with group size g:
    qweight  int32 [in, out/8]     eight output features an element
    qzeros   int32 [in/g, out/8]   the same packing; absent without zero points, then every zero is 8
    scales   float [in/g, out]     W = (code − zero) · scale

Nibble i of an element (bits 4i … 4i+3) holds output feature 0, 2, 4, 6, 1, 3, 5, 7 of its eight: low and high nibbles
of the first two bytes are the even features, those of the last two bytes the odd ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

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

ROWS_AT_ONCE = 1024
"""Input features unpacked in one go: bounds the temporary memory to about this many × out bytes."""


@dataclass(frozen=True)
class Awq:
    group_size: int  # −1: one group over all input features
    zero_point: bool = True
    name: str = "awq"

    def tensors(self, in_features: int, *, bias: bool) -> tuple[StoredTensor, ...]:
        group = in_features if self.group_size == -1 else self.group_size
        stored = (
            StoredTensor(name="qweight", dims=(Dim("in"), Dim("out", 8)), dtypes=(torch.int32,), random=random_codes),
            StoredTensor(
                name="qzeros",
                dims=(Dim("in", group), Dim("out", 8)),
                dtypes=(torch.int32,),
                random=constant(0x88888888 - 2**32),
                optional=not self.zero_point,
            ),
            StoredTensor(
                name="scales",
                dims=(Dim("in", group), Dim("out")),
                dtypes=FLOAT_TYPES,
                random=random_scales(in_features),
            ),
        )
        return (*stored, bias_tensor()) if bias else stored

    def repack(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Int4Weight:
        qweight, scales = raw["qweight"], raw["scales"].to(dtype)
        in_features, out_features = qweight.shape[0], scales.shape[1]
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=qweight.device)
        for start in range(0, in_features, ROWS_AT_ONCE):
            codes = _unpack(qweight[start : start + ROWS_AT_ONCE])  # [rows, out]
            pairs = codes[0::2] | codes[1::2] << 4  # [rows/2, out]: two input features a byte
            packed[:, start // 2 : start // 2 + len(pairs)] = pairs.t()
        zeros = _unpack(raw["qzeros"]) if "qzeros" in raw else torch.full_like(scales, 8, dtype=torch.uint8)
        return Int4Weight(qweight=packed, scales=scales, zeros=zeros, group_size=in_features // len(scales))


def _unpack(stored: torch.Tensor) -> torch.Tensor:
    """int32 [rows, out/8] → uint8 codes [rows, out]."""
    octets = stored.contiguous().view(torch.uint8).view(len(stored), -1, 2, 2)  # [rows, out/8, even|odd, 2 bytes]
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(3)  # [rows, out/8, even|odd, 4]
    return nibbles.transpose(2, 3).flatten(1)
