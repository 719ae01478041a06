"""Llama 2 and 3.x (Touvron et al. 2023; Grattafiori et al. 2024): no biases unless config.json says so."""

from __future__ import annotations

import torch
from torch import nn

from nybble.layers.attention import PagedAttention
from nybble.layers.context import ForwardContext
from nybble.layers.linear import Linear
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target
from nybble.models.config import DecoderConfig, HfConfig, flag, read_decoder
from nybble.models.decoder import CausalLM


class LlamaAttention(nn.Module):
    """q, k, v = split(W_qkv x);  q, k = rotate(q, k);  W_o · attend(q, k, v). Also Mistral's, with its window."""

    def __init__(self, target: Target, config: DecoderConfig, layer: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = (heads * config.head_dim for heads in self.heads)
        qkv = {"q_proj": q, "k_proj": k, "v_proj": v}
        self.qkv_proj = Linear(target, config.hidden_size, qkv, bias=config.qkv_bias)
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
        self.rotary(q, k, ctx.positions)
        return self.o_proj(self.attention(q, k, v, ctx))


class LlamaForCausalLM(CausalLM):
    attention = LlamaAttention

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        bias = flag(hf, "attention_bias")
        return read_decoder(hf, qkv_bias=bias, output_bias=bias, mlp_bias=flag(hf, "mlp_bias"))
