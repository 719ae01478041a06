"""Rotary position frequencies: the plain ones and the four ways that models stretch them to longer contexts.

Every token's angles depend on nothing but its position, so one table serves all sequences, chunks and cached blocks.

Formulas: RoPE, Su et al. 2021 · linear, Chen et al. 2023 · dynamic NTK and YaRN, Peng et al. 2023 · llama3, Llama 3.1's
reference code. Arithmetic is fp32 in transformers' order, so that angles agree with it to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rope settings of a model; names are transformers'.

    Args:
        original_max_position_embeddings: context length before stretching.
        attention_factor: multiplies cos and sin (so logits by its square); None: the type's default.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def table(self, num_positions: int, dim: int) -> torch.Tensor:
        """[num_positions, dim] fp32: the cosines of dim/2 angles for each position, then their sines."""
        position = torch.arange(num_positions, dtype=torch.float32)[:, None]
        frequencies = {
            "default": self._plain,
            "linear": lambda dim: self._plain(dim) / self.factor,
            "dynamic": lambda dim: self._dynamic(num_positions, dim),
            "llama3": self._llama3,
            "yarn": self._yarn,
        }[self.rope_type](dim)
        angles = position * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self._amplitude()

    def _exponents(self, dim: int) -> torch.Tensor:
        return torch.arange(0, dim, 2, dtype=torch.float32) / dim

    def _plain(self, dim: int) -> torch.Tensor:
        return 1.0 / self.rope_theta ** self._exponents(dim)

    def _dynamic(self, num_positions: int, dim: int) -> torch.Tensor:
        """[num_positions, dim/2]: position p has the frequencies of a sequence that ends with it.

        transformers changes the frequencies whenever the longest sequence of a forward grows past the original length,
        and leaves cached keys as they are. Decoding one token a step it thus computes what stands in this table, and up
        to the original length the two agree always. Only in a prompt that is longer than that does it turn the early
        positions with the prompt's frequencies, which a cache shared between sequences could not do.
        """
        length = torch.arange(1, num_positions + 1, dtype=torch.float32).clamp(
            min=self.original_max_position_embeddings
        )
        stretch = self.factor * length / self.original_max_position_embeddings - (self.factor - 1)
        base = self.rope_theta * stretch ** (dim / (dim - 2))
        return 1.0 / base[:, None] ** self._exponents(dim)

    def _llama3(self, dim: int) -> torch.Tensor:
        """Long waves are stretched by `factor`, short ones kept, those between blended."""
        plain = self._plain(dim)
        rotations = self.original_max_position_embeddings / (2 * math.pi / plain)  # within the original context
        blend = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - blend) * plain / self.factor + blend * plain
        stretched = torch.where(rotations < self.low_freq_factor, plain / self.factor, blended)
        return torch.where(rotations > self.high_freq_factor, plain, stretched)

    def _yarn(self, dim: int) -> torch.Tensor:
        """Dimensions with many rotations in the original context keep their frequency, those with few are stretched."""
        low, high = self._yarn_dimension(self.beta_fast, dim), self._yarn_dimension(self.beta_slow, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        stretched_share = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept_share = 1 - stretched_share
        wavelengths = self.rope_theta ** self._exponents(dim)
        return 1.0 / (self.factor * wavelengths) * (1 - kept_share) + 1.0 / wavelengths * kept_share

    def _yarn_dimension(self, rotations: float, dim: int) -> float:
        """The (fractional) dimension that turns this often within the original context."""
        wavelength = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(self.rope_theta))

    def _amplitude(self) -> float:
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._yarn_scale(self.mscale) / self._yarn_scale(self.mscale_all_dim)
        return self._yarn_scale(1.0)

    def _yarn_scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0
