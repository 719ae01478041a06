"""`Embedding`: token ids to vectors, and, where a model ties the two, hidden states back to logits."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn
from torch.nn import functional

from nybble.formats import Quantization
from nybble.formats.format import FLOAT_TYPES, normal
from nybble.kernels import dense_linear
from nybble.layers.slot import Slot
from nybble.layers.target import Target


class Embedding(nn.Module):
    """A [vocab_size, size] table, always dense; `tied` if it serves as the output layer too."""

    def __init__(self, target: Target, vocab_size: int, size: int, *, tied: bool = False) -> None:
        super().__init__()
        self.target = target
        self.tied = tied
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
        if self.tied:
            out_features, in_features = self.weight.shape
            impl = self.target.bind(dense_linear.OP, out_features=out_features, in_features=in_features)
            assert impl.prepare is not None, f"{impl.name} has no prepare"
            self._multiply, self._packed = impl.launch, impl.prepare(self.weight.data)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, size]."""
        return functional.embedding(token_ids, self.weight)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, size] → [R, vocab_size]: the tied output layer."""
        return self._multiply(hidden, self._packed, None)
