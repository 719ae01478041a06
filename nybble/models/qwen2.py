"""Qwen2 and Qwen2.5 (Yang et al. 2024): q, k and v have biases; upper layers may look back over a sliding window."""

from __future__ import annotations

import torch
from torch import nn

from nybble.layers.attention import PagedAttention
from nybble.layers.context import ForwardContext
from nybble.layers.linear import Linear
from nybble.layers.qkv import RotaryQKV
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target
from nybble.models.config import DecoderConfig, HfConfig, read_decoder, windows_by_layer
from nybble.models.decoder import CausalLM


class Qwen2Attention(nn.Module):
    """q, k, v = split(W_qkv x + b_qkv);  q, k = rotate(q, k);  W_o · attend(q, k, v)."""

    def __init__(self, target: Target, config: DecoderConfig, layer: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.attention = PagedAttention(
            target,
            layer=layer,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_windows[layer],
        )
        self.qkv_proj = RotaryQKV(target, config.hidden_size, self.attention, rotary, bias=config.qkv_bias)
        self.o_proj = Linear(target, config.num_heads * config.head_dim, {"o_proj": config.hidden_size})

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.o_proj(self.attention(self.qkv_proj(x, ctx), ctx))


class Qwen2ForCausalLM(CausalLM):
    attention = Qwen2Attention

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        return read_decoder(hf, qkv_bias=True, sliding_windows=windows_by_layer(hf))
