"""`RMSNorm`: x / rms(x) · weight, with the residual stream's addition folded in."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from nybble.formats import Quantization
from nybble.formats.format import FLOAT_TYPES
from nybble.kernels import rms_norm
from nybble.layers.slot import Slot
from nybble.layers.target import Target


class RMSNorm(nn.Module):
    """Over the last dimension of [T, size]."""

    def __init__(self, target: Target, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        weight = torch.empty(size, dtype=target.dtype, device=target.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._norm = target.bind(rms_norm.OP, hidden=size).launch

    def slots(self, path: str, quantization: Quantization, stored: Container[str] | None) -> dict[str, Slot]:
        return {
            f"{path}.weight": Slot(
                shape=tuple(self.weight.shape),
                dtypes=FLOAT_TYPES,
                accept=self.weight.copy_,
                random=lambda shape, generator: torch.ones(shape, device=generator.device),
            )
        }

    def finish(self) -> None:
        """Nothing to repack."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum x + residual, and the sum itself: the new residual."""
        return self._norm(x, self.weight, self.eps, residual)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """Norm each head of [T, heads, size] on its own."""
        return self._norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps, None)[0].view(x.shape)
