"""Rotary frequencies against transformers' own functions, far out where small errors grow."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nybble.layers.rope import Rope
from nybble.models.config import read_rope

CASES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3.1": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen2.5-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_table_equals_transformers(name: str, head_dim: int) -> None:
    settings = CASES[name]
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=32768, rope_parameters=dict(settings)
    )
    positions = torch.arange(0, 32768, 97)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    rope, _ = read_rope({"max_position_embeddings": 32768, "rope_parameters": settings})
    table = rope.table(32768, head_dim)[positions]
    half = head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=1e-6, rtol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=1e-6, rtol=0)


def test_dynamic_positions_have_the_frequencies_of_a_sequence_ending_there() -> None:
    settings = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=100, rope_parameters=settings)
    rope, usable = read_rope({"max_position_embeddings": 100, "rope_parameters": settings})
    assert usable == 200
    table = rope.table(usable, 64)
    for position in (0, 99, 100, 150, 199):
        inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=position + 1)
        torch.testing.assert_close(table[position, :32], (position * inverse).cos(), atol=1e-5, rtol=0)
    # A longer table changes nothing: cached blocks stay valid whatever comes later.
    torch.testing.assert_close(rope.table(150, 64), table[:150], atol=1e-5, rtol=0)


def test_yarn_edges() -> None:
    """A single correction dimension is a step, and factors up to 1 leave amplitudes alone."""
    step = Rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=2048, beta_fast=1.0, beta_slow=1.0)
    assert torch.isfinite(step.table(8, 16)).all()
    same = Rope(rope_type="yarn", factor=1.0, original_max_position_embeddings=2048)
    torch.testing.assert_close(same.table(8, 16), Rope().table(8, 16), atol=1e-6, rtol=0)
