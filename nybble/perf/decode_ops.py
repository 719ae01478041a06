"""`decode_ops`: the operations of one decode step of a model, with the shapes and the number of times they run.

Owns: what the layers bind, told as cases of the kernels. Does not know: weights, how long anything takes.

    qkv         int4_qkv where an implementation exists, else int4_linear, rotary and kv_write
    gate_up     int4_gated where one exists, else int4_linear and silu_mul

On N devices (tensor parallel) q, k, v, gate, up and lm_head have 1/N of their rows, o and down 1/N of their columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
from nybble.perf.model_shape import LinearShape, ModelShape


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
        cost: Cost = OPS[self.op].cost(self.case, dtype)
        return cost


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A model as far as the shapes of its decode step go, and where it runs.

    Args:
        model: one device's part.
        max_model_len: the longest sequence that the engine is made for: attention is split for it.
        kernels: forced implementations, operation → name.
    """

    model: ModelShape
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


def step_shape(model: ModelShape, resolved: ResolvedConfig, num_devices: int = 1) -> StepShape:
    """Of one device's part of the whole model.

    Raises:
        ConfigError: it cannot be divided so.
    """
    return StepShape(
        model=model.split_by(num_devices),
        device=torch.device(resolved.device),
        dtype=getattr(torch, resolved.dtype),
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
        kernels=resolved.kernels,
    )


def decode_ops(shape: StepShape, batch: int, context_len: int) -> list[DecodeOp]:
    """What one decode step of `batch` sequences runs, each with `context_len` tokens, the new one included."""
    config = shape.model.config
    ops = [DecodeOp("norm", "rms_norm", rms_norm.Case(batch, config.hidden_size), 2 * config.num_layers + 1)]
    for name, make in (("qkv", _qkv), ("o", _plain), ("gate_up", _gate_up), ("down", _plain)):
        if name == "o":
            ops += _attention(shape, batch, context_len)
        for linear, calls in shape.model.linears:  # one for each format in which layers store it
            if linear.name == name:
                ops += make(shape, linear, batch, calls)
    return [*ops, *_plain(shape, shape.model.lm_head, batch, 1)]


def _plain(shape: StepShape, linear: LinearShape, batch: int, calls: int) -> Iterator[DecodeOp]:
    name, k, n, group = linear.name, linear.in_features, linear.out_features, linear.group_size
    if group is None:
        yield DecodeOp(name, "dense_linear", dense_linear.Case(batch, k, n, has_bias=linear.has_bias), calls)
        return
    if k % group:
        raise ConfigError(f"{name}: {k} input features are no whole number of groups of {group}")
    yield DecodeOp(name, "int4_linear", int4_linear.Case(batch, k, n, group, has_bias=linear.has_bias), calls)


def _qkv(shape: StepShape, linear: LinearShape, batch: int, calls: int) -> Iterator[DecodeOp]:
    model, head_dim = shape.model, shape.model.config.head_dim
    heads, kv_heads, group = model.num_heads, model.num_kv_heads, linear.group_size
    if group is not None and not model.config.qk_norm:
        case = int4_qkv.Case(batch, linear.in_features, heads, kv_heads, head_dim, group, linear.has_bias)
        fused = DecodeOp("qkv", "int4_qkv", case, calls)
        if shape.is_fused(fused):
            yield fused
            return
    yield from _plain(shape, linear, batch, calls)
    if model.config.qk_norm:
        for name, rows in (("q_norm", heads), ("k_norm", kv_heads)):
            norm = rms_norm.Case(batch * rows, head_dim, has_residual=False)
            yield DecodeOp(name, "rms_norm", norm, calls)
    yield DecodeOp("rotary", "rotary", rotary.Case(batch, heads, kv_heads, head_dim, head_dim), calls)
    yield DecodeOp("kv_write", "kv_write", kv_write.Case(batch, kv_heads, head_dim, shape.block_size), calls)


def _attention(shape: StepShape, batch: int, context_len: int) -> Iterator[DecodeOp]:
    """One operation for each sliding window that layers have."""
    model = shape.model
    for window, calls in Counter(model.config.sliding_windows).items():
        case = attention.Case(
            query_lens=(1,) * batch,
            seq_lens=(context_len,) * batch,
            query_heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.config.head_dim,
            block_size=shape.block_size,
            sliding_window=window,
            slack=max(0, shape.max_model_len - context_len),
        )
        yield DecodeOp("attention" if window is None else f"attention/{window}", "attention", case, calls)


def _gate_up(shape: StepShape, linear: LinearShape, batch: int, calls: int) -> Iterator[DecodeOp]:
    size = linear.out_features // 2
    if linear.group_size is not None and not linear.has_bias:
        case = int4_gated.Case(batch, linear.in_features, size, linear.group_size)
        fused = DecodeOp("gate_up", "int4_gated", case, calls)
        if shape.is_fused(fused):
            yield fused
            return
    yield from _plain(shape, linear, batch, calls)
    yield DecodeOp("silu_mul", "silu_mul", silu_mul.Case(batch, size), calls)
