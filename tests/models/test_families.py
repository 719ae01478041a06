"""Every family and rope scaling against transformers: fp32, CPU, paged cache, however the tokens are cut into steps."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    FAMILIES,
    SMALL,
    make_checkpoint,
    reference_greedy,
    reference_logits,
)
from support.paged_driver import PagedDriver
from transformers import PreTrainedModel

from nybble.models.checkpoint import Checkpoint
from nybble.models.decoder import CausalLM
from nybble.models.load import load_model

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.7,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
MODELS = [(family, None) for family in FAMILIES] + [("llama", rope) for rope in ROPES] + [("qwen2", "yarn")]
NUM_TOKENS = 64


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(SMALL["vocab_size"]), k=count)


PROMPTS = {name: tokens(count, seed) for seed, (name, count) in enumerate({"a": 23, "b": 1, "c": 70, "d": 8}.items())}


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: "-".join(filter(None, m)))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalLM, PreTrainedModel]:
    family, rope = request.param
    path = tmp_path_factory.mktemp("model")
    fields = {"rope_parameters": {"rope_theta": 500.0, **ROPES[rope]}} if rope else {}
    return load(path, family, **fields)


def load(path: Path, family: str, **fields: Any) -> tuple[CausalLM, PreTrainedModel]:
    reference = make_checkpoint(path, family, **fields)
    model = load_model(Checkpoint.open(path), dtype=torch.float32, device=torch.device("cpu"))
    return model, reference


def test_logits(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    model, reference = pair
    prompt = tokens(100, seed=9)
    logits = PagedDriver(model).step({0: prompt})[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference_logits(reference, prompt), atol=1e-4, rtol=0)


def test_batched_logits(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    model, reference = pair
    for name, logits in PagedDriver(model).step(PROMPTS).items():
        torch.testing.assert_close(logits, reference_logits(reference, PROMPTS[name]), atol=1e-4, rtol=0)


def test_chunked_prefill_mixed_with_decode(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    model, reference = pair
    driver = PagedDriver(model)
    long, short = tokens(60, seed=5), tokens(30, seed=6)
    got: dict[object, list[torch.Tensor]] = {"long": [], "short": []}
    # One sequence in chunks of odd sizes, the other one token a step beside it.
    for step, begin in enumerate(range(0, len(long), 7)):
        rows = {"long": long[begin : begin + 7], "short": short[step : step + 1]}
        for name, logits in driver.step(rows).items():
            got[name].append(logits)
    torch.testing.assert_close(torch.cat(got["long"]), reference_logits(reference, long), atol=1e-4, rtol=0)
    done = driver.lengths["short"]
    torch.testing.assert_close(torch.cat(got["short"]), reference_logits(reference, short[:done]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_greedy_tokens_alone_and_batched(pair: tuple[CausalLM, PreTrainedModel]) -> None:
    model, reference = pair
    expected = {name: reference_greedy(reference, prompt, NUM_TOKENS) for name, prompt in PROMPTS.items()}
    assert len({token for out in expected.values() for token in out}) > 12  # not one token over and over
    assert PagedDriver(model).greedy(PROMPTS, NUM_TOKENS) == expected
    assert PagedDriver(model).greedy({"a": PROMPTS["a"]}, NUM_TOKENS) == {"a": expected["a"]}


def test_dynamic_rope_past_the_original_length(tmp_path: Path) -> None:
    """Decoding across the border follows transformers, which stretches the frequencies token by token there."""
    rope = {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 4.0}
    model, reference = load(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=32)
    assert model.config.max_position_embeddings == 128
    prompt = tokens(20, seed=1)
    assert PagedDriver(model).greedy({0: prompt}, NUM_TOKENS)[0] == reference_greedy(reference, prompt, NUM_TOKENS)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_reduced_types_stay_close(tmp_path: Path, family: str, dtype: torch.dtype, bound: float) -> None:
    """Bounds are 2 to 3 times what rounding alone gives; logits have unit size."""
    reference = make_checkpoint(tmp_path, family, dtype=dtype)
    model = load_model(Checkpoint.open(tmp_path), dtype=dtype, device=torch.device("cpu"))
    assert model.kv_spec.dtype == dtype
    prompt = tokens(60, seed=3)
    logits, expected = PagedDriver(model).step({0: prompt})[0], reference_logits(reference, prompt)
    assert logits.dtype == torch.float32
    error = (logits - expected).abs()
    assert error.max() < bound * expected.std()
    assert error.max() > 0  # it did compute in the reduced type


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2-window", "qwen3", "llama-bias", "mistral"])
def test_on_a_gpu(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    reference = make_checkpoint(tmp_path, family, dtype=dtype)
    model = load_model(Checkpoint.open(tmp_path), dtype=dtype, device=torch.device("cuda"))
    driver = PagedDriver(model, block_size=16)
    for name, logits in driver.step(PROMPTS).items():
        expected = reference_logits(reference, PROMPTS[name])
        assert (logits.cpu() - expected).abs().max() < 0.15 * expected.std()
