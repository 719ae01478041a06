"""`RotaryQKV`: q, k, v of attention, q and k turned by their positions, k and v in the cache."""

from __future__ import annotations

import torch

from nybble.kernels import int4_qkv
from nybble.kernels.int4_weight import Int4Weight
from nybble.layers.attention import PagedAttention
from nybble.layers.context import ForwardContext
from nybble.layers.linear import Linear
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target


class RotaryQKV(Linear):
    """[T, in_features] → queries [T, heads, D], in one operation where there is one.

    Args:
        attention: whose heads these are, and whose cache keys and values go to.
    """

    def __init__(
        self, target: Target, in_features: int, attention: PagedAttention, rotary: RotaryEmbedding, *, bias: bool
    ) -> None:
        self.heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        sizes = (heads * attention.head_dim for heads in self.heads)
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True))
        super().__init__(target, in_features, parts, bias=bias)
        self._attention = (attention,)  # in a tuple: it is no part of this module
        self._rotary = (rotary,)
        self._fused = None

    def _bind(self, weight: Int4Weight | torch.Tensor) -> None:
        if isinstance(weight, Int4Weight):
            (attention,), (rotary,) = self._attention, self._rotary
            layout = {"head_dim": attention.head_dim, "rotary_dim": rotary.cos_sin.shape[1]}
            sizes = {"in_features": self.in_features, "group_size": weight.group_size, **layout}
            impl = self.target.find(int4_qkv.OP, **sizes)
            if impl is not None:
                assert impl.prepare is not None, f"{impl.name} has no prepare"
                self._fused, self._weight = impl.launch, impl.prepare(weight, **layout)
                return
        super()._bind(weight)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        (attention,), (rotary,) = self._attention, self._rotary
        if self._fused is not None:
            caches = ctx.kv_caches[attention.layer]
            return self._fused(x, self._weight, self._bias, ctx.positions, rotary.cos_sin, *caches, ctx.slot_mapping)
        q, k, v = super().forward(x).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=1)  # [T, heads, D]
        rotary(q, k, ctx.positions)
        attention.write(k, v, ctx)
        return q
