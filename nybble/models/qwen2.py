"""Qwen2 and Qwen2.5 (Yang et al. 2024): q, k and v have biases; upper layers may look back over a sliding window."""

from __future__ import annotations

import torch
from torch import nn

from nybble.layers.attention import PagedAttention
from nybble.layers.context import ForwardContext
from nybble.layers.linear import Linear
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target
from nybble.models.config import DecoderConfig, HfConfig, read_decoder, windows_by_layer
from nybble.models.decoder import CausalLM


class Qwen2Attention(nn.Module):
    """q, k, v = split(W_qkv x + b_qkv);  q, k = rotate(q, k);  W_o · attend(q, k, v)."""

    def __init__(self, target: Target, config: DecoderConfig, layer: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = (heads * config.head_dim for heads in self.heads)
        self.qkv_proj = Linear(target, config.hidden_size, {"q_proj": q, "k_proj": k, "v_proj": v}, bias=True)
        self.o_proj = Linear(target, q, {"o_proj": config.hidden_size})
        self.rotary = rotary
        self.attention = PagedAttention(
            target,
            layer=layer,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_windows[layer],
        )

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=1)  # [T, heads, D]
        self.rotary(q, k, ctx.positions)
        return self.o_proj(self.attention(q, k, v, ctx))


class Qwen2ForCausalLM(CausalLM):
    attention = Qwen2Attention

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        return read_decoder(hf, sliding_windows=windows_by_layer(hf))
