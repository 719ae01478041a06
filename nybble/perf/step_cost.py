"""`Part`: what one operation of a step must at least move and compute, by `Op.cost`; `parts_of` lists a step's.

Parts are the model's, not an implementation's: where a kernel does a neighbour's work too (bias, rotation and cache
write behind qkv), the neighbour keeps its part and its measured time shows in the kernel's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from nybble.kernels import attention, dense_linear, int4_gated, int4_linear, kv_write, rms_norm, rotary, silu_mul
from nybble.kernels.op import Cost
from nybble.perf.model_shape import LinearShape, ModelShape

Kind = Literal[
    "weight GEMMs",
    "dequantization",
    "attention",
    "norms and activations",
    "KV writes",
    "sampling",
    "communication",
    "other on the device",
    "host gaps",
]
"""Where a step's time goes. Dequantization stands apart only where a kernel of its own does it."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Work:
    """What a step runs: groups of equal sequences, each (new tokens, length with them, how many)."""

    groups: tuple[tuple[int, int, int], ...]

    @staticmethod
    def decode(batch: int, context_len: int) -> Work:
        """One new token each, which sees `context_len` tokens, itself among them."""
        return Work(((1, context_len, batch),))

    @staticmethod
    def prefill(prompt_len: int, num_prompts: int = 1) -> Work:
        return Work(((prompt_len, prompt_len, num_prompts),))

    def __add__(self, other: Work) -> Work:
        return Work(self.groups + other.groups)

    @property
    def num_tokens(self) -> int:
        return sum(new * count for new, _, count in self.groups)

    @property
    def num_sequences(self) -> int:
        return sum(count for _, _, count in self.groups)


@dataclass(frozen=True)
class Part:
    """One operation, `count` times a step; `cost` is of one time."""

    name: str
    kind: Kind
    cost: Cost
    count: int = 1
    link_bytes: int = 0  # each device sends as many to the others, one time

    @property
    def num_bytes(self) -> int:
        return self.cost.bytes * self.count

    @property
    def flops(self) -> int:
        return self.cost.flops * self.count


def parts_of(shape: ModelShape, work: Work, dtype: torch.dtype, *, kv_itemsize: int | None = None) -> list[Part]:
    """All of a step on one device, in the order of a layer.

    Args:
        dtype: of activations and dense weights.
        kv_itemsize: bytes of a cached element; None: those of `dtype`.
    """
    tokens, config = work.num_tokens, shape.config
    return [
        Part("embedding", "other on the device", Cost(2 * tokens * config.hidden_size * dtype.itemsize, 0)),
        *(_linear(linear, tokens, count, dtype) for linear, count in shape.linears),
        *_attention(shape, work, dtype, kv_itemsize or dtype.itemsize),
        *_small(shape, tokens, dtype),
        _linear(shape.lm_head, work.num_sequences, 1, dtype),
        Part("sampling", "sampling", Cost(4 * work.num_sequences * config.vocab_size, 0)),
        *_communication(shape, work, dtype),
    ]


def _linear(linear: LinearShape, tokens: int, count: int, dtype: torch.dtype) -> Part:
    k, n, group = linear.in_features, linear.out_features, linear.group_size
    if group is None:
        cost = dense_linear.cost(dense_linear.Case(tokens, k, n), dtype)
    elif linear.name == "gate_up":
        cost = int4_gated.cost(int4_gated.Case(tokens, k, n // 2, group), dtype)
    else:
        cost = int4_linear.cost(int4_linear.Case(tokens, k, n, group), dtype)
    return Part(linear.name, "weight GEMMs", cost, count)


def _attention(shape: ModelShape, work: Work, dtype: torch.dtype, kv_itemsize: int) -> Iterator[Part]:
    """One part for each sliding window that layers have; sequences of a group cost the same."""
    config = shape.config
    for window, count in Counter(config.sliding_windows).items():
        num_bytes = flops = 0
        for new, length, number in work.groups:
            case = attention.Case(
                (new,), (length,), shape.num_heads, shape.num_kv_heads, config.head_dim, sliding_window=window
            )
            cost = attention.cost(case, dtype)
            num_keys = min(length, (window or length) + new - 1)
            saved = 2 * num_keys * shape.num_kv_heads * config.head_dim * (dtype.itemsize - kv_itemsize)
            num_bytes += (cost.bytes - saved) * number
            flops += cost.flops * number
        name = "attention" if window is None else f"attention (window {window})"
        yield Part(name, "attention", Cost(num_bytes, flops), count)
    write = kv_write.cost(kv_write.Case(work.num_tokens, shape.num_kv_heads, config.head_dim, block_size=16), dtype)
    yield Part("kv_write", "KV writes", write, config.num_layers)


def _small(shape: ModelShape, tokens: int, dtype: torch.dtype) -> Iterator[Part]:
    config = shape.config
    hidden = rms_norm.cost(rms_norm.Case(tokens, config.hidden_size, has_residual=True), dtype)
    yield Part("rms_norm", "norms and activations", hidden, 2 * config.num_layers + 1)
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, config.head_dim
    if config.qk_norm:
        own = rms_norm.cost(rms_norm.Case(tokens * (heads + kv_heads), head_dim, has_residual=False), dtype)
        yield Part("qk_norm", "norms and activations", own, config.num_layers)
    turn = rotary.cost(rotary.Case(tokens, heads, kv_heads, head_dim, head_dim), dtype)
    yield Part("rotary", "norms and activations", turn, config.num_layers)
    is_dense = sum(count for linear, count in shape.linears if linear.name == "gate_up" and linear.group_size is None)
    if is_dense:  # a 4-bit gate_up ends with it
        size = config.intermediate_size // shape.num_devices
        yield Part("silu_mul", "norms and activations", silu_mul.cost(silu_mul.Case(tokens, size), dtype), is_dense)


def _communication(shape: ModelShape, work: Work, dtype: torch.dtype) -> Iterator[Part]:
    """Tensor parallel (Shoeybi et al. 2019): sums after o and down, and the parts of the logits side by side.

    A ring or a reduce-scatter with all-gather sends 2·(n − 1)/n of the tensor from each of n devices.
    """
    devices, config = shape.num_devices, shape.config
    if devices == 1:
        return
    size = work.num_tokens * config.hidden_size * dtype.itemsize
    sent = 2 * size * (devices - 1) // devices
    yield Part("all_reduce", "communication", Cost(0, 0), 2 * config.num_layers, link_bytes=sent)
    logits = work.num_sequences * config.vocab_size * dtype.itemsize * (devices - 1) // devices
    yield Part("gather_logits", "communication", Cost(0, 0), 1, link_bytes=logits)
