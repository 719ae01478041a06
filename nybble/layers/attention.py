"""`PagedAttention`: writes a step's keys and values to the cache, and attends to what each sequence has there."""

from __future__ import annotations

import torch
from torch import nn

from nybble.kernels import attention, kv_write
from nybble.layers.context import ForwardContext
from nybble.layers.target import Target


class PagedAttention(nn.Module):
    """Causal attention of grouped query heads.

    Args:
        layer: which of `ctx.kv_caches` is this layer's.
        sliding_window: a token sees itself and the window − 1 tokens before it; None: all of them.
    """

    def __init__(
        self,
        target: Target,
        *,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self._write = target.bind(kv_write.OP, kv_heads=num_kv_heads, head_dim=head_dim).launch
        self._attend = target.bind(attention.OP, query_heads=num_heads, kv_heads=num_kv_heads, head_dim=head_dim).launch

    def write(self, k: torch.Tensor, v: torch.Tensor, ctx: ForwardContext) -> None:
        """Put k and v [T, kv_heads, D] into the cache."""
        self._write(k, v, *ctx.kv_caches[self.layer], ctx.slot_mapping)

    def forward(self, q: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """q [T, heads, D] → [T, heads · D]; keys and values of the step must be in the cache."""
        out = self._attend(
            q,
            *ctx.kv_caches[self.layer],
            ctx.block_tables,
            ctx.seq_lens,
            ctx.query_start,
            ctx.min_query_len,
            ctx.max_query_len,
            ctx.max_seq_len,
            self.scale,
            self.sliding_window,
        )
        return out.flatten(1)
