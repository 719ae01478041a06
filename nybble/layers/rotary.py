"""`RotaryEmbedding`: turns queries and keys by their positions. One table a model, shared by its layers."""

from __future__ import annotations

import torch
from torch import nn

from nybble.core.errors import ModelError
from nybble.kernels import rotary
from nybble.layers.rope import Rope
from nybble.layers.target import Target

MAX_TABLE_BYTES = 8 << 30


class RotaryEmbedding(nn.Module):
    """Raises ModelError where so many positions are asked for that their table would fill the memory."""

    def __init__(self, target: Target, rope: Rope, *, num_positions: int, head_dim: int) -> None:
        super().__init__()
        if num_positions * head_dim * 4 > MAX_TABLE_BYTES:
            raise ModelError(
                f"{num_positions} positions need a rotary table of {num_positions * head_dim * 4 / 1e9:.0f} GB; "
                f"set max_model_len (config.json's max_position_embeddings is the default)"
            )
        # One row to spare: a step in flight may run one token past the end of a sequence that has just finished.
        table = rope.table(num_positions + 1, head_dim).to(target.device)
        self.register_buffer("cos_sin", table, persistent=False)
        self._rotate = target.bind(rotary.OP, head_dim=head_dim, rotary_dim=head_dim).launch

    def forward(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> None:
        """Turn q [T, heads, D] and k [T, kv_heads, D] in place."""
        self._rotate(q, k, positions, self.cos_sin)
