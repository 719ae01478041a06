"""`CausalLM`: the pre-norm decoder that all families share. A family brings its attention and how its config is read.

    h = embed(ids);  for each layer:  h = h + attention(norm(h));  h = h + mlp(norm(h));   logits = lm_head(norm(h))

The running sum h travels as `residual` beside the last sublayer's output, so that each norm adds and norms in one pass.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import nn

from nybble.layers.context import ForwardContext, KVSpec
from nybble.layers.embedding import Embedding
from nybble.layers.linear import Linear
from nybble.layers.mlp import GatedMLP
from nybble.layers.norm import RMSNorm
from nybble.layers.rotary import RotaryEmbedding
from nybble.layers.target import Target
from nybble.models.config import DecoderConfig, HfConfig


class AttentionFactory(Protocol):
    def __call__(self, target: Target, config: DecoderConfig, layer: int, rotary: RotaryEmbedding) -> nn.Module: ...


class DecoderLayer(nn.Module):
    def __init__(self, target: Target, config: DecoderConfig, attention: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(target, config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(target, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(target, config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, ctx)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, target: Target, config: DecoderConfig, attention: AttentionFactory, num_positions: int) -> None:
        super().__init__()
        tied = config.tie_word_embeddings
        self.embed_tokens = Embedding(target, config.vocab_size, config.hidden_size, tied=tied)
        rotary = RotaryEmbedding(target, config.rope, num_positions=num_positions, head_dim=config.head_dim)
        self.layers = nn.ModuleList(
            DecoderLayer(target, config, attention(target, config, layer, rotary)) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(target, config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        x, residual = self.embed_tokens(token_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, ctx)
        return self.norm(x, residual)[0]


class CausalLM(nn.Module):
    """A language model; module names are the checkpoint's, but for q, k, v and gate, up, which are fused.

    Args:
        max_model_len: positions to prepare for; None: all that the model has.
    """

    attention: ClassVar[AttentionFactory]

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        """Read this family's config.json. Raises ModelError naming the field."""
        raise NotImplementedError

    def __init__(self, target: Target, config: DecoderConfig, max_model_len: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.target = target
        num_positions = max_model_len or config.max_position_embeddings
        self.model = Decoder(target, config, type(self).attention, num_positions)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(target, config.hidden_size, {"lm_head": config.vocab_size})

    @property
    def kv_spec(self) -> KVSpec:
        c = self.config
        return KVSpec(
            num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, dtype=self.target.dtype
        )

    @property
    def kernels(self) -> dict[str, str]:
        """Operation → the implementations in use."""
        return {op: ", ".join(sorted(names)) for op, names in sorted(self.target.chosen.items())}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are stored (an implementation's padding not counted)."""
        linears = sum(module.weight_bytes for module in self.modules() if isinstance(module, Linear))
        return linears + sum(parameter.nbytes for parameter in self.parameters())

    def forward(self, token_ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """[T] ids → [T, hidden_size], normed."""
        return self.model(token_ids, ctx)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size] float32."""
        tied = self.config.tie_word_embeddings
        return (self.model.embed_tokens.project(hidden) if tied else self.lm_head(hidden)).float()
