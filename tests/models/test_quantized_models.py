"""AWQ and GPTQ checkpoints, packed and dequantized by the tests' own code, against transformers."""

import random
from pathlib import Path

import pytest
import torch
from support.checkpoints import Quantized, make_checkpoint, reference_greedy, reference_logits
from support.paged_driver import PagedDriver

from nybble.models.checkpoint import Checkpoint
from nybble.models.load import load_model

STORED = {
    "awq-32": Quantized(method="awq", group_size=32),
    "awq-64": Quantized(method="awq", group_size=64),
    "awq-128": Quantized(method="awq", group_size=128),
    "awq-all": Quantized(method="awq", group_size=-1),
    "awq-without-zeros": Quantized(method="awq", symmetric=True),
    "awq-partly": Quantized(method="awq", not_converted=("layers.1.", "down_proj")),
    "gptq-32": Quantized(method="gptq", group_size=32),
    "gptq-128-symmetric": Quantized(method="gptq", symmetric=True),
    "gptq-v2": Quantized(method="gptq", checkpoint_format="gptq_v2", g_idx=False),
    "gptq-all-zero-bias": Quantized(method="gptq", group_size=-1, zero_bias=True),
    "gptq-partly": Quantized(method="gptq", not_converted=("self_attn",)),
}
CPU = torch.device("cpu")
PROMPT = random.Random(4).choices(range(160), k=50)


@pytest.mark.parametrize("name", STORED)
def test_logits(tmp_path: Path, name: str) -> None:
    # 256 input features: more than one group even where the group has 128.
    reference = make_checkpoint(tmp_path, "qwen2", quantized=STORED[name], hidden_size=256, num_shards=3)
    model = load_model(Checkpoint.open(tmp_path), dtype=torch.float32, device=CPU)
    logits = PagedDriver(model).step({0: PROMPT})[0]
    torch.testing.assert_close(logits, reference_logits(reference, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("llama-bias", "awq-32"), ("qwen3", "gptq-128-symmetric")])
def test_greedy_tokens(tmp_path: Path, family: str, name: str) -> None:
    reference = make_checkpoint(tmp_path, family, quantized=STORED[name])
    model = load_model(Checkpoint.open(tmp_path), dtype=torch.float32, device=CPU)
    assert PagedDriver(model).greedy({0: PROMPT}, 64)[0] == reference_greedy(reference, PROMPT, 64)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.003), (torch.bfloat16, 0.03)])
def test_reduced_types_stay_close(tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    reference = make_checkpoint(tmp_path, "qwen2", quantized=STORED["awq-128"], dtype=dtype)
    model = load_model(Checkpoint.open(tmp_path), dtype=dtype, device=CPU)
    expected = reference_logits(reference, PROMPT)
    error = (PagedDriver(model).step({0: PROMPT})[0] - expected).abs()
    assert 0 < error.mean() < bound * expected.std()
    assert error.max() < 20 * bound * expected.std()


@pytest.mark.gpu
@pytest.mark.parametrize("name", STORED)
def test_on_a_gpu(tmp_path: Path, name: str) -> None:
    reference = make_checkpoint(tmp_path, "qwen2", quantized=STORED[name], hidden_size=256, num_shards=3)
    model = load_model(Checkpoint.open(tmp_path), dtype=torch.float16, device=torch.device("cuda"))
    expected = reference_logits(reference, PROMPT)
    logits = PagedDriver(model, block_size=16).step({0: PROMPT})[0]
    assert (logits.cpu() - expected).abs().max() < 0.03 * expected.std()
