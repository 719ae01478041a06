"""`GatedMLP`: down(silu(gate(x)) · up(x)), gate and up in one matrix."""

from __future__ import annotations

import torch
from torch import nn

from nybble.kernels import silu_mul
from nybble.layers.linear import Linear
from nybble.layers.target import Target


class GatedMLP(nn.Module):
    def __init__(self, target: Target, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        gate_up = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(target, hidden_size, gate_up, bias=bias)
        self.down_proj = Linear(target, intermediate_size, {"down_proj": hidden_size}, bias=bias)
        self._activate = target.bind(silu_mul.OP, size=intermediate_size).launch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._activate(self.gate_up_proj(x)))
