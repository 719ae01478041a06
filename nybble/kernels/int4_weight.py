"""`Int4Weight`: the canonical form of one 4-bit linear, between a checkpoint's `Format` and a kernel's `prepare`.

    W[n, k] = (code[n, k] − zero[k // g, n]) · scale[k // g, n]        codes and zeros in 0 … 15, g = group_size

Formats repack into it at load time, kernels lay it out once more the way they read it; nobody keeps it afterwards.
Owns: the meaning of the bits. Does not know: checkpoints, devices, who multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Int4Weight:
    qweight: torch.Tensor  # uint8 [N, K / 2]: byte j holds k = 2j in its low nibble, k = 2j + 1 in its high one
    scales: torch.Tensor  # compute dtype [K / g, N]
    zeros: torch.Tensor  # uint8 [K / g, N]; symmetric checkpoints: all 8
    group_size: int

    def __post_init__(self) -> None:
        groups = (self.in_features // self.group_size, self.out_features)
        assert self.qweight.dtype == self.zeros.dtype == torch.uint8, (self.qweight.dtype, self.zeros.dtype)
        assert self.in_features % self.group_size == 0, (self.in_features, self.group_size)
        assert self.scales.shape == self.zeros.shape == groups, (self.scales.shape, self.zeros.shape, groups)

    @property
    def in_features(self) -> int:
        return 2 * self.qweight.shape[1]

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    def codes(self) -> torch.Tensor:
        """The 4-bit codes, one a byte: uint8 [N, K]."""
        return torch.stack((self.qweight & 15, self.qweight >> 4), dim=-1).flatten(1)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight itself, [N, K]: each element is rounded to `dtype` once."""
        groups, n = self.scales.shape
        centered = self.codes().view(n, groups, self.group_size).to(dtype) - self.zeros.T.unsqueeze(-1).to(dtype)
        return centered.mul_(self.scales.T.unsqueeze(-1).to(dtype)).view(n, self.in_features)


def random_int4_weight(
    out_features: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    symmetric: bool = False,
) -> Int4Weight:
    """Random codes, scales and zeros whose product with unit-variance activations has about unit variance."""
    shape = (in_features // group_size, out_features)

    def integers(shape: tuple[int, int], high: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device, dtype=torch.uint8)

    # Codes and zeros around 8 differ by about 6.5 in the mean square.
    scales = torch.rand(shape, generator=generator, device=device).add_(0.5).div_(6.5 * in_features**0.5)
    zeros = torch.full(shape, 8, dtype=torch.uint8, device=device) if symmetric else integers(shape, 16)
    return Int4Weight(integers((out_features, in_features // 2), 256), scales.to(dtype), zeros, group_size)
