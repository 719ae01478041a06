"""What a model, its steps and its KV cache take of a device's memory, by arithmetic: for machines that are not at hand.

On the machine itself `runner/measure.py` measures; this estimate is for planning. Its constants are set by one start
(Qwen2.5-32B AWQ on an H100, 8192 tokens and 128 sequences a step), whose 200,976 KV tokens it meets within 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.perf.machines import Machine
from nybble.perf.model_shape import ModelShape
from nybble.runner.graphs import step_sizes
from nybble.runner.memory import MARGIN_BYTES

USABLE_SHARE = 0.99
"""Of the memory that the driver shows, what CUDA gives out."""
CONTEXT_BYTES = 1_600_000_000
"""CUDA context, compiled kernels, library handles, and what loading leaves behind in the allocator."""
LOGIT_COPIES = 8
"""fp32 [sequences, vocabulary] tensors that the sampler holds at its worst: sorting has values and 64-bit indices."""
GRAPH_BYTES = 10_000_000
"""Of one captured graph."""
MOST_UTILIZATION = 0.97
"""That a plan asks for: above it, what other programs take meanwhile is no longer covered."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one device."""

    total_bytes: float
    weight_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int

    @property
    def free_bytes(self) -> float:
        """After the weights, before a step."""
        return self.total_bytes - self.weight_bytes - CONTEXT_BYTES

    @property
    def room_bytes(self) -> float:
        """The most that a KV cache can take; negative: the model does not fit."""
        return self.free_bytes - self.workspace_bytes - MARGIN_BYTES

    @property
    def most_kv_tokens(self) -> int:
        """At MOST_UTILIZATION; 0: the model does not fit."""
        return self.kv_tokens(MOST_UTILIZATION)

    def kv_tokens(self, utilization: float) -> int:
        """That `gpu_memory_utilization` leaves room for."""
        room = self.room_bytes - (1 - utilization) * self.total_bytes
        return max(0, int(room // self.kv_bytes_per_token))

    def utilization_for(self, num_tokens: int) -> float:
        """The least `gpu_memory_utilization` that gives so many KV tokens; above 1: none does."""
        return (self.total_bytes - self.room_bytes + num_tokens * self.kv_bytes_per_token) / self.total_bytes

    def entry_count_for(self, num_tokens: int) -> float:
        """The same as LMDeploy's `cache_max_entry_count`: a share of what the weights leave free."""
        return num_tokens * self.kv_bytes_per_token / self.free_bytes


def plan_memory(
    shape: ModelShape,
    machine: Machine,
    itemsize: int,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_itemsize: int | None = None,
) -> MemoryPlan:
    """For one device of the model's."""
    return MemoryPlan(
        total_bytes=machine.memory_bytes * USABLE_SHARE,
        weight_bytes=shape.weight_bytes(itemsize),
        workspace_bytes=workspace_bytes(shape, itemsize, max_num_seqs, max_num_batched_tokens),
        kv_bytes_per_token=shape.kv_bytes_per_token(kv_itemsize or itemsize),
    )


def workspace_bytes(shape: ModelShape, itemsize: int, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """A step's temporaries at their worst: activations at a layer's widest moments, the 16-bit scratch that a large
    step dequantizes its largest matrix to, logits; and as many graphs as on Hopper, which has most."""
    config = shape.config
    by_name = {linear.name: linear for linear, _ in shape.linears}
    widest = 4 * config.hidden_size + by_name["gate_up"].out_features // 2 + by_name["qkv"].out_features
    scratch = max(linear.num_quantized_weights for linear, _ in shape.linears)
    logits = LOGIT_COPIES * 4 * max_num_seqs * config.vocab_size
    graphs = GRAPH_BYTES * len(step_sizes(max_num_seqs, max_num_batched_tokens))
    return graphs + logits + (max_num_batched_tokens * widest + scratch) * itemsize
