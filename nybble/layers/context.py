"""`ForwardContext`: one step's device tensors. Passed as an argument to every layer that needs it, never global.

Owns nothing between steps. T tokens of R sequences lie back to back; a sequence being decoded is one with a single new
token, and nothing else tells prefill from decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    positions: torch.Tensor  # [T] int64, position of each token in its sequence
    slot_mapping: torch.Tensor  # [T] int64, block id × block_size + offset for K and V; −1 writes nothing
    block_tables: torch.Tensor  # [R, max_blocks] int32, entries past a sequence's length are arbitrary
    seq_lens: torch.Tensor  # [R] int32, tokens to attend to, the new ones included; 0 for padding rows
    query_start: torch.Tensor  # [R + 1] int32, where each sequence's tokens begin in T
    min_query_len: int  # host-side bounds, for launches
    max_query_len: int
    max_seq_len: int
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]]  # a layer: K, V [blocks, kv_heads, block_size, head_dim]


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """What a model keeps for each token and layer; the runner sizes the cache from it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
