"""`PagedAttention`: writes a step's keys and values to the cache, then attends to what each sequence has there."""

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
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self._write = target.bind(kv_write.OP, num_kv_heads=num_kv_heads, head_dim=head_dim).launch
        self._attend = target.bind(
            attention.OP, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        ).launch

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] → [T, heads · D]."""
        key_cache, value_cache = ctx.kv_caches[self.layer]
        self._write(k, v, key_cache, value_cache, ctx.slot_mapping)
        out = self._attend(
            q,
            key_cache,
            value_cache,
            ctx.block_tables,
            ctx.seq_lens,
            ctx.query_start,
            ctx.max_query_len,
            ctx.max_seq_len,
            self.scale,
            self.sliding_window,
        )
        return out.flatten(1)
