"""The K and V of every layer, in one allocation.

Owns: the tensors, and how many bytes a block takes. Does not know: which sequence uses which block.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nybble.layers.context import KVSpec


class KVCache:
    """`layers[i]` is (K, V) of layer i, each [num_blocks, kv_heads, block_size, head_dim].

    One tensor underneath: the allocator rounds each request up to 2 MB, which for 2 × 64 tensors would lose 0.1 GB.
    It starts as zeros, since uninitialized memory may hold NaN, and 0 · NaN would reach the sums of masked attention.
    """

    def __init__(self, spec: KVSpec, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self._storage = _zeros(shape, spec.dtype, device)
        self.layers = [(layer[0], layer[1]) for layer in self._storage]

    @property
    def num_bytes(self) -> int:
        return self._storage.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which cost nothing until they are written; torch would write them all now.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_block(spec: KVSpec, block_size: int) -> int:
    """Bytes that one block takes over all layers, K and V."""
    return spec.bytes_per_token * block_size
