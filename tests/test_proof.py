"""The engine against transformers, fp32 on a CPU: 64 greedy tokens, the same ones however the work is cut up.

Every family, rope scaling and checkpoint format goes through five modes. Each mode also asserts that it was one: that
prompts were cut, sequences preempted, cached tokens found. That the logits agree too is shown in tests/models.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import Quantized, make_checkpoint, reference_greedy
from support.small_tokenizers import byte_level_tokenizer_json, write_tokenizer

from nybble.build import build_engine
from nybble.core.config import EngineConfig
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.engine.engine import Engine

NUM_TOKENS = 64
VOCAB_SIZE = 512
BLOCK_SIZE = 8
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)


def rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **settings}}


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"seed": 1},
    "qwen2-tied": {},
    "qwen2-window": {},
    "qwen3": {},
    "qwen3-bias": {},
    "llama": {},
    "llama-bias": {},
    "mistral": {},
    "mistral-full": {},
    "linear": {"family": "llama", **rope("linear", factor=3.0)},
    "llama3": {"family": "llama", **rope("llama3", factor=8.0, original_max_position_embeddings=64, **BANDS)},
    "yarn": {"family": "qwen2", **rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    # Outputs pass the original length: up to there this scaling changes nothing.
    "dynamic": {"family": "llama", "max_position_embeddings": 48, **rope("dynamic", factor=4.0)},
    "awq": {"family": "qwen2", "quantized": Quantized(method="awq", group_size=32)},
    "awq-without-zeros": {"family": "qwen3", "quantized": Quantized(method="awq", symmetric=True)},
    "awq-partly": {"family": "llama", "quantized": Quantized(method="awq", not_converted=("layers.1.",))},
    "gptq": {"family": "qwen2", "quantized": Quantized(method="gptq", group_size=32)},
    "gptq-symmetric": {"family": "mistral", "seed": 1, "quantized": Quantized(method="gptq", symmetric=True)},
    "gptq-v2": {"family": "llama", "quantized": Quantized(method="gptq", group_size=64, checkpoint_format="gptq_v2")},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in ("qwen2", "awq")]


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


PREFIX = tokens(20, seed=1)  # two and a half blocks
PROMPTS = [PREFIX + tokens(17, seed=2), PREFIX + tokens(3, seed=3), tokens(1, seed=4), tokens(9, seed=5)]


@dataclass(frozen=True)
class Proof:
    path: Path
    expected: list[list[int]]  # of each prompt
    bytes_per_token: int  # K and V of all layers

    def engine(self, **settings: Any) -> Engine:
        defaults = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_cache_memory_bytes": 4 << 20}
        return build_engine(EngineConfig(model=str(self.path), device="cpu", **defaults | settings))


@pytest.fixture(scope="module", params=["qwen2", "awq", *SLOW])
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    fields = {"family": request.param, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE} | MODELS[request.param]
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, byte_level_tokenizer_json())
    reference = make_checkpoint(path, **fields)
    expected = [reference_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len({token for output in expected for token in output}) > 25, "the model says the same over and over"
    spec = reference.config
    head_dim = getattr(spec, "head_dim", None) or spec.hidden_size // spec.num_attention_heads
    return Proof(path, expected, 2 * spec.num_hidden_layers * spec.num_key_value_heads * head_dim * 4)


def run(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[SequenceDelta]]:
    """The output of each prompt, all of them served together; and the deltas."""
    for index, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=PARAMS))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [delta.error for delta in deltas if delta.error] == []
    outputs = [[t for d in deltas if d.request_id == str(i) for t in d.token_ids] for i in range(len(prompts))]
    return outputs, deltas


def test_alone(proof: Proof) -> None:
    engine = proof.engine(enable_prefix_caching=False)
    assert [run(engine, [prompt])[0][0] for prompt in PROMPTS] == proof.expected
    assert engine.stats.num_steps == NUM_TOKENS * len(PROMPTS)


def test_batched(proof: Proof) -> None:
    engine = proof.engine(enable_prefix_caching=False)
    assert run(engine, PROMPTS)[0] == proof.expected
    assert engine.stats.num_steps == NUM_TOKENS, "they ran side by side"


def test_chunked(proof: Proof) -> None:
    engine = proof.engine(enable_prefix_caching=False, max_num_batched_tokens=7, max_num_seqs=4)
    assert run(engine, PROMPTS)[0] == proof.expected
    assert engine.stats.num_steps > NUM_TOKENS + len(PROMPTS[0]) // 7, "prompts were cut"


def test_preempted(proof: Proof) -> None:
    """20 blocks hold 160 tokens; the four sequences grow to 323."""
    kv_cache_memory_bytes = 20 * BLOCK_SIZE * proof.bytes_per_token
    engine = proof.engine(enable_prefix_caching=False, kv_cache_memory_bytes=kv_cache_memory_bytes)
    assert engine.stats.num_kv_blocks == 20
    assert run(engine, PROMPTS)[0] == proof.expected
    assert engine.stats.num_preemptions > 0


def test_prefix_cached(proof: Proof) -> None:
    engine = proof.engine()
    first, deltas = run(engine, PROMPTS[:1])
    assert all(delta.num_cached_tokens == 0 for delta in deltas)
    second, deltas = run(engine, PROMPTS[1:])
    assert first + second == proof.expected
    cached = {delta.request_id: delta.num_cached_tokens for delta in reversed(deltas)}  # of each request's first one
    assert cached == {"0": len(PREFIX) // BLOCK_SIZE * BLOCK_SIZE, "1": 0, "2": 0}
    again, _ = run(engine, PROMPTS)
    assert again == proof.expected, "blocks that decoding filled serve as well"
