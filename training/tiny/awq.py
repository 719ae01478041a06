"""Four-bit rounding and the AWQ `gemm` layout: one linear weight to qweight, qzeros, scales, and back.

Groups of `GROUP_SIZE` inputs share a scale and a zero point: w ≈ (code − zero) · scale, code and zero in 0 … 15.
Eight 4-bit values lie in an int32, along the outputs; nibble i (from the low end) holds column `ORDER[i]` of the eight.
"""

from __future__ import annotations

import torch

GROUP_SIZE = 128
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round `weight` [out, in] to the nearest of 16 levels from each group's lowest to its highest value.

    Returns codes [out, in], zeros and scales [out, in / group], all float32; scales are exact in float16.
    """
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1), zeros, scales


def dequantize(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] that the codes stand for, in float32."""
    groups = codes.unflatten(1, (-1, GROUP_SIZE))
    return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """The rounded weight, with the gradient of the unrounded one (straight-through estimator)."""
    with torch.no_grad():
        error = dequantize(*quantize(weight)) - weight
    return weight + error


def pack(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 0 … 15 to int32 [rows, columns / 8]."""
    nibbles = values.to(torch.int64).unflatten(1, (-1, 8))[..., list(ORDER)]
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`; float32."""
    nibbles = (words.to(torch.int64)[..., None] >> torch.arange(0, 32, 4)) & 15
    values = torch.empty_like(nibbles)
    values[..., list(ORDER)] = nibbles
    return values.flatten(1).float()


def to_awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three tensors that stand for `weight` [out, in] in an AWQ checkpoint; all lie [in, out]-wise."""
    codes, zeros, scales = quantize(weight)
    return {
        "qweight": pack(codes.T),  # [in, out / 8]
        "qzeros": pack(zeros.T),  # [in / group, out / 8]
        "scales": scales.T.half().contiguous(),  # [in / group, out]
    }


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_awq`: the weight [out, in] in float32."""
    return dequantize(unpack(qweight).T, unpack(qzeros).T, scales.T.float())
