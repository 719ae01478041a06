"""Llama 2 and 3.x (Touvron et al. 2023; Grattafiori et al. 2024): no biases unless config.json says so."""

from __future__ import annotations

import torch
from torch import nn

from nybble.layers.attention import PagedAttention
from nybble.layers.context import ForwardContext
from nybble.layers.linear import Linear
from nybble.layers.qkv import RotaryQKV
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target
from nybble.models.config import DecoderConfig, HfConfig, flag, read_decoder
from nybble.models.decoder import CausalLM


class LlamaAttention(nn.Module):
    """q, k, v = split(W_qkv x);  q, k = rotate(q, k);  W_o · attend(q, k, v). Also Mistral's, with its window."""

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
        self.o_proj = Linear(
            target, config.num_heads * config.head_dim, {"o_proj": config.hidden_size}, bias=config.output_bias
        )

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.o_proj(self.attention(self.qkv_proj(x, ctx), ctx))


class LlamaForCausalLM(CausalLM):
    attention = LlamaAttention

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        bias = flag(hf, "attention_bias")
        return read_decoder(hf, qkv_bias=bias, output_bias=bias, mlp_bias=flag(hf, "mlp_bias"))
