"""Loading streams: never much more than the model and the tensor in hand. And dummy weights, which need no files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import Quantized, make_checkpoint
from support.paged_driver import PagedDriver

from nybble.layers.linear import Linear
from nybble.models.checkpoint import Checkpoint
from nybble.models.decoder import CausalLM
from nybble.models.load import load_model

# Loads a checkpoint in fp16 and prints the model's bytes, and by how much the peak of resident memory grew meanwhile.
# `VmHWM` and not `ru_maxrss`: the latter begins with what the parent process had.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from nybble.models.checkpoint import Checkpoint
from nybble.models.load import load_model
from nybble.models.safetensors_file import TensorReader

def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

def load(path):
    return load_model(Checkpoint.open(Path(path)), dtype=torch.float16, device=torch.device("cpu"))

small, large, holds = sys.argv[1:]
load(small)
if holds == "holds":  # what a loader does that reads all shards and then builds
    read, held = TensorReader.read, []
    TensorReader.read = lambda *args: held.append(read(*args)) or held[-1]
before = peak()
model = load(large)
print(json.dumps({"model": model.weight_bytes, "growth": peak() - before}))
"""
SLACK = 48 << 20  # the linear in hand, three times over: as stored, cast, and while it is packed


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """340 MB of fp32 in 8 shards; tensors are dealt out in turn, so that most layers wait for the last shard."""
    path = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "vocab_size": 4096}
    make_checkpoint(path, "llama", num_shards=8, **sizes)
    return path


@pytest.mark.slow
def test_peak_memory_is_the_model_and_less_than_a_shard_more(large: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")

    def measure(mode: str) -> dict[str, int]:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(large), mode]
        # Large blocks go back to the system when freed, as the measurement takes them to.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return dict(json.loads(result.stdout))

    sizes = [file.stat().st_size for file in large.glob("*.safetensors")]
    streamed, held = measure("streams"), measure("holds")
    bound = streamed["model"] + max(sizes) + SLACK
    assert streamed["growth"] < bound < streamed["model"] + sum(sizes) / 2
    assert held["growth"] > bound + sum(sizes) / 4, "holding all shards at once would be noticed"


STORED = {
    "dense": None,
    "awq": Quantized(method="awq", group_size=32),
    "awq-without-zeros": Quantized(method="awq", group_size=64, symmetric=True),
    "awq-partly": Quantized(method="awq", not_converted=("down_proj",)),
    "gptq": Quantized(method="gptq", group_size=32),
    "gptq-v2": Quantized(method="gptq", checkpoint_format="gptq_v2"),
}


def load(path: Path, load_format: str) -> CausalLM:
    return load_model(Checkpoint.open(path), dtype=torch.float32, device=torch.device("cpu"), load_format=load_format)


def linears(model: CausalLM) -> dict[str, tuple[int, int, int]]:
    """Sizes and bytes of each linear: the bytes tell 4 bit from dense."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))
    return {name: (module.out_features, module.in_features, module.weight_bytes) for name, module in found}


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
@pytest.mark.parametrize("name", STORED)
def test_dummy_weights_are_shaped_like_real_ones(tmp_path: Path, family: str, name: str) -> None:
    make_checkpoint(tmp_path, family, quantized=STORED[name])
    real = load(tmp_path, "safetensors")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    dummy, again = load(tmp_path, "dummy"), load(tmp_path, "dummy")
    assert linears(dummy) == linears(real)
    assert {n: p.shape for n, p in dummy.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    logits, repeated = (PagedDriver(model).step({0: list(range(50))})[0] for model in (dummy, again))
    assert logits.shape == (50, real.config.vocab_size)
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert torch.equal(logits, repeated), "the same weights each time"
