"""`Embedding`: token ids to vectors, and, where a model ties the two, hidden states back to logits."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn
from torch.nn import functional

from nybble.formats import Quantization
from nybble.formats.format import FLOAT_TYPES, normal
from nybble.layers.slot import Slot
from nybble.layers.target import Target


class Embedding(nn.Module):
    """A [vocab_size, size] table, always dense."""

    def __init__(self, target: Target, vocab_size: int, size: int) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, size, dtype=target.dtype, device=target.device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def slots(self, path: str, quantization: Quantization, stored: Container[str] | None) -> dict[str, Slot]:
        return {
            f"{path}.weight": Slot(
                shape=tuple(self.weight.shape),
                dtypes=FLOAT_TYPES,
                accept=self.weight.copy_,
                # Small enough that tied logits stay near unit size.
                random=normal(self.weight.shape[1] ** -0.5),
            )
        }

    def finish(self) -> None:
        """Nothing to repack."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, size]."""
        return functional.embedding(token_ids, self.weight)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, size] → [R, vocab_size]: the tied output layer."""
        return functional.linear(hidden, self.weight)
