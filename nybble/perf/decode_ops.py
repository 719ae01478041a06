"""`decode_ops`: the operations of one decode step of a model, with the shapes and the number of times they run.

Owns: what the layers bind, told as cases of the kernels. Does not know: weights, how long anything takes.

    qkv         int4_qkv where an implementation exists, else int4_linear, rotary and kv_write
    gate_up     int4_gated where one exists, else int4_linear and silu_mul

On N devices (tensor parallel) q, k, v, gate, up and lm_head have 1/N of their rows, o and down 1/N of their columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nybble import formats
from nybble.core.config import ResolvedConfig
from nybble.core.errors import ConfigError
from nybble.kernels import (
    attention,
    dense_linear,
    int4_gated,
    int4_linear,
    int4_qkv,
    kv_write,
    rms_norm,
    rotary,
    silu_mul,
)
from nybble.kernels.check import OPS, sizes_of
from nybble.kernels.op import Cost, Impl, Spec, bind
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import DecoderConfig
from nybble.models.qwen3 import Qwen3ForCausalLM
from nybble.models.registry import family_of


@dataclass(frozen=True)
class DecodeOp:
    """`name` is its place in the layer; `op` and `case` what runs there; `calls` how often in a step."""

    name: str
    op: str
    case: Any
    calls: int

    def spec(self, device: torch.device, dtype: torch.dtype) -> Spec:
        return Spec(device=device, dtype=dtype, sizes=sizes_of(self.case))

    def cost(self, dtype: torch.dtype) -> Cost:
        """Of one call."""
        return OPS[self.op].cost(self.case, dtype)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A model as far as the shapes of its decode step go, and where it runs.

    Args:
        max_model_len: the longest sequence that the engine is made for: attention is split for it.
        kernels: forced implementations, operation → name.
    """

    config: DecoderConfig
    quantization: formats.Quantization
    norms_heads: bool  # q and k are normed by head before they are turned
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    block_size: int
    kernels: Mapping[str, str]

    def choose(self, op: DecodeOp) -> Impl:
        """The implementation that a model would bind."""
        return bind(OPS[op.op], op.spec(self.device, self.dtype), self.kernels)

    def is_fused(self, op: DecodeOp) -> bool:
        """Whether an operation that others can stand in for would be used."""
        return self.choose(op) is not OPS[op.op].reference

    def group_size(self, linear: str, in_features: int) -> int | None:
        """Columns of a group of the first layer's linear; None: it is not quantized."""
        group = getattr(self.quantization.format_of(linear, in_features, None), "group_size", None)
        return in_features if group == -1 else group

    def sharded(self, num_devices: int) -> StepShape:
        """One device's part in a tensor-parallel model.

        Raises:
            ConfigError: something cannot be divided.
        """
        if num_devices == 1:
            return self
        c = self.config
        group = self.group_size("model.layers.0.mlp.down_proj", c.intermediate_size) or 1
        sizes = {"num_attention_heads": (c.num_heads, 1), "intermediate_size": (c.intermediate_size, group)}
        sizes["vocab_size"] = (c.vocab_size, 1)
        for name, (size, unit) in sizes.items():
            if size % (num_devices * unit):
                whole = f" into whole groups of {unit}" if unit > 1 else ""
                raise ConfigError(f"--tp {num_devices}: {name} = {size} cannot be divided by it{whole}")
        if c.num_kv_heads % num_devices and num_devices % c.num_kv_heads:
            raise ConfigError(f"--tp {num_devices}: num_key_value_heads = {c.num_kv_heads} is no multiple or divisor")
        part = replace(
            c,
            num_heads=c.num_heads // num_devices,
            num_kv_heads=max(1, c.num_kv_heads // num_devices),
            intermediate_size=c.intermediate_size // num_devices,
            vocab_size=c.vocab_size // num_devices,
        )
        return replace(self, config=part)


def step_shape(checkpoint: Checkpoint, resolved: ResolvedConfig) -> StepShape:
    """Raises ModelError or UnsupportedError naming the field of config.json."""
    family = family_of(checkpoint.hf)
    return StepShape(
        config=family.read_config(checkpoint.hf),
        quantization=formats.from_hf(checkpoint.hf),
        norms_heads=issubclass(family, Qwen3ForCausalLM),
        device=torch.device(resolved.device),
        dtype=getattr(torch, resolved.dtype),
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
        kernels=resolved.kernels,
    )


def decode_ops(shape: StepShape, batch: int, context_len: int) -> list[DecodeOp]:
    """What one decode step of `batch` sequences runs, each with `context_len` tokens, the new one included."""
    c = shape.config
    norm = DecodeOp("norm", "rms_norm", rms_norm.Case(batch, c.hidden_size), 2 * c.num_layers + 1)
    o = _linear(shape, "o", "self_attn.o_proj", batch, c.num_heads * c.head_dim, c.hidden_size, c.output_bias)
    down = _linear(shape, "down", "mlp.down_proj", batch, c.intermediate_size, c.hidden_size, c.mlp_bias)
    head_group = None if c.tie_word_embeddings else shape.group_size("lm_head", c.hidden_size)
    head = _product("lm_head", batch, c.hidden_size, c.vocab_size, head_group, False, 1)
    attend = _attention(shape, batch, context_len)
    return [norm, *_qkv(shape, batch), *attend, o, *_gate_up(shape, batch), down, head]


def step_cost(ops: list[DecodeOp], dtype: torch.dtype) -> Cost:
    """Of a whole step; what is read of the embedding table is less than a thousandth of it."""
    costs = [(op.cost(dtype), op.calls) for op in ops]
    return Cost(sum(c.bytes * calls for c, calls in costs), sum(c.flops * calls for c, calls in costs))


def _qkv(shape: StepShape, batch: int) -> Iterator[DecodeOp]:
    c = shape.config
    group = shape.group_size("model.layers.0.self_attn.q_proj", c.hidden_size)
    if group is not None and not shape.norms_heads:
        case = int4_qkv.Case(batch, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, group, c.qkv_bias)
        fused = DecodeOp("qkv", "int4_qkv", case, c.num_layers)
        if shape.is_fused(fused):
            yield fused
            return
    rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    yield _product("qkv", batch, c.hidden_size, rows, group, c.qkv_bias, c.num_layers)
    if shape.norms_heads:
        for name, heads in (("q_norm", c.num_heads), ("k_norm", c.num_kv_heads)):
            case = rms_norm.Case(batch * heads, c.head_dim, has_residual=False)
            yield DecodeOp(name, "rms_norm", case, c.num_layers)
    turn = rotary.Case(batch, c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim)
    yield DecodeOp("rotary", "rotary", turn, c.num_layers)
    write = kv_write.Case(batch, c.num_kv_heads, c.head_dim, shape.block_size)
    yield DecodeOp("kv_write", "kv_write", write, c.num_layers)


def _attention(shape: StepShape, batch: int, context_len: int) -> Iterator[DecodeOp]:
    """One operation for each sliding window that layers have."""
    c = shape.config
    slack = max(0, shape.max_model_len - context_len)
    for window, calls in Counter(c.sliding_windows).items():
        case = attention.Case(
            query_lens=(1,) * batch,
            seq_lens=(context_len,) * batch,
            query_heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            block_size=shape.block_size,
            sliding_window=window,
            slack=slack,
        )
        yield DecodeOp("attention" if window is None else f"attention/{window}", "attention", case, calls)


def _gate_up(shape: StepShape, batch: int) -> Iterator[DecodeOp]:
    c = shape.config
    group = shape.group_size("model.layers.0.mlp.gate_proj", c.hidden_size)
    if group is not None and not c.mlp_bias:
        case = int4_gated.Case(batch, c.hidden_size, c.intermediate_size, group)
        fused = DecodeOp("gate_up", "int4_gated", case, c.num_layers)
        if shape.is_fused(fused):
            yield fused
            return
    yield _product("gate_up", batch, c.hidden_size, 2 * c.intermediate_size, group, c.mlp_bias, c.num_layers)
    yield DecodeOp("silu_mul", "silu_mul", silu_mul.Case(batch, c.intermediate_size), c.num_layers)


def _linear(
    shape: StepShape, name: str, path: str, batch: int, in_features: int, out_features: int, has_bias: bool
) -> DecodeOp:
    group = shape.group_size(f"model.layers.0.{path}", in_features)
    return _product(name, batch, in_features, out_features, group, has_bias, shape.config.num_layers)


def _product(
    name: str, batch: int, in_features: int, out_features: int, group: int | None, has_bias: bool, calls: int
) -> DecodeOp:
    if group is None:
        return DecodeOp(
            name, "dense_linear", dense_linear.Case(batch, in_features, out_features, has_bias=has_bias), calls
        )
    if in_features % group:
        raise ConfigError(f"{name}: {in_features} input features are no whole number of groups of {group}")
    case = int4_linear.Case(batch, in_features, out_features, group, has_bias=has_bias)
    return DecodeOp(name, "int4_linear", case, calls)
