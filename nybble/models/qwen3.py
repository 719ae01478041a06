"""Qwen3, dense (Yang et al. 2025): each head of q and k is normed before it is turned; head_dim is its own field."""

from __future__ import annotations

import torch
from torch import nn

from nybble.layers.attention import PagedAttention
from nybble.layers.context import ForwardContext
from nybble.layers.linear import Linear
from nybble.layers.norm import RMSNorm
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target
from nybble.models.config import DecoderConfig, HfConfig, flag, read_decoder, windows_by_layer
from nybble.models.decoder import CausalLM


class Qwen3Attention(nn.Module):
    """q, k, v = split(W_qkv x);  q, k = rotate(norm(q), norm(k));  W_o · attend(q, k, v)."""

    def __init__(self, target: Target, config: DecoderConfig, layer: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = (heads * config.head_dim for heads in self.heads)
        qkv = {"q_proj": q, "k_proj": k, "v_proj": v}
        self.qkv_proj = Linear(target, config.hidden_size, qkv, bias=config.qkv_bias)
        self.q_norm = RMSNorm(target, config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(target, config.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(target, q, {"o_proj": config.hidden_size}, bias=config.output_bias)
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
        q, k = self.q_norm.heads(q), self.k_norm.heads(k)
        self.rotary(q, k, ctx.positions)
        self.attention.write(k, v, ctx)
        return self.o_proj(self.attention(q, ctx))


class Qwen3ForCausalLM(CausalLM):
    attention = Qwen3Attention

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        bias = flag(hf, "attention_bias")
        head_dim = {"head_dim": 128}  # the family's, where config.json does not say
        return read_decoder(
            {**head_dim, **hf}, qkv_bias=bias, qk_norm=True, output_bias=bias, sliding_windows=windows_by_layer(hf)
        )
