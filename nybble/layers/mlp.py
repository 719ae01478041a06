"""`GatedMLP`: down(silu(gate(x)) · up(x)), gate and up in one matrix."""

from __future__ import annotations

import torch
from torch import nn

from nybble.kernels import int4_gated, silu_mul
from nybble.kernels.int4_weight import Int4Weight
from nybble.layers.linear import Linear
from nybble.layers.target import Target


class GatedMLP(nn.Module):
    def __init__(self, target: Target, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = GatedLinear(target, hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(target, intermediate_size, {"down_proj": hidden_size}, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x))


class GatedLinear(Linear):
    """[T, in_features] → silu(gate) · up [T, size], in one operation where there is one."""

    def __init__(self, target: Target, in_features: int, size: int, *, bias: bool = False) -> None:
        super().__init__(target, in_features, {"gate_proj": size, "up_proj": size}, bias=bias)
        self._fused = None
        self._size = size

    def _bind(self, weight: Int4Weight | torch.Tensor) -> None:
        if isinstance(weight, Int4Weight) and self._bias is None:
            sizes = {"out_features": self._size, "in_features": self.in_features, "group_size": weight.group_size}
            impl = self.target.find(int4_gated.OP, **sizes)
            if impl is not None:
                assert impl.prepare is not None, f"{impl.name} has no prepare"
                self._fused, self._weight = impl.launch, impl.prepare(weight)
                return
        super()._bind(weight)
        self._activate = self.target.bind(silu_mul.OP, intermediate=self._size).launch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._fused is not None:
            return self._fused(x, self._weight)
        return self._activate(super().forward(x))
