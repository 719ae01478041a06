"""EngineConfig → ResolvedConfig: every None is decided, nonsense and contradictions name the field and the remedy."""

import math
from dataclasses import FrozenInstanceError, fields

import pytest

from nybble.core.config import EngineConfig, HardwareFacts, MemorySetting, ModelFacts, resolve
from nybble.core.errors import ConfigError

MODEL = ModelFacts(max_position_embeddings=4096, dtype="float16", vocab_size=100)
CPU = HardwareFacts(device="cpu", supports_bfloat16=True)
GPU = HardwareFacts(device="cuda", supports_bfloat16=True)
OLD_GPU = HardwareFacts(device="cuda", supports_bfloat16=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"load_format": "pickle"}, "load_format"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens"),
        ({"kv_cache_memory_bytes": -1}, "kv_cache_memory_bytes"),
        ({"block_size": 12}, "block_size"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization"),
        ({"cache_max_entry_count": 0.0}, "cache_max_entry_count"),
        ({"cache_max_entry_count": 1.0}, r"cache_max_entry_count must be a number in \(0, 1\) or None, got 1.0"),
        ({"cache_max_entry_count": True}, "cache_max_entry_count"),
        ({"model": 5}, "model must be a Hugging Face id or a directory, got 5"),
        ({"kernels": "abc"}, "kernels must be a dict of strings to strings, got 'abc'"),
        ({"kernels": None}, "kernels must be a dict"),
        ({"kernels": {"attention": 1}}, "kernels must be a dict"),
        ({"seed": [1]}, "seed must be an integer"),
        ({"seed": 2**63}, "seed must be an integer ≥ -2"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"enforce_eager": "x"}, "enforce_eager must be True or False"),
        ({"revision": 5}, "revision must be a string or None, got 5"),
        ({"download_dir": 5}, "download_dir must be a string or None"),
        ({"device": ["cpu"]}, "device must be one of"),
        ({"block_size": True}, "block_size"),
        ({"block_size": None}, "block_size"),
        ({"max_num_seqs": 2**63}, "max_num_seqs"),
        (
            {"cache_max_entry_count": 0.5, "gpu_memory_utilization": 0.5},
            "at most one of the KV memory settings; got gpu_memory_utilization and cache_max_entry_count",
        ),
    ],
)
def test_nonsense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"model": "m", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "hardware", "message"),
    [
        ({"max_model_len": 5000}, CPU, "longer than this model's 4096"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, CPU, "raise the first or lower the second"),
        ({"gpu_memory_utilization": 0.5}, CPU, "on a CPU give kv_cache_memory_bytes"),
        ({"dtype": "bfloat16"}, OLD_GPU, "use float16"),
    ],
)
def test_what_does_not_suit_the_machine_is_refused(
    settings: dict[str, object], hardware: HardwareFacts, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(EngineConfig(model="m", **settings), MODEL, hardware)  # type: ignore[arg-type]


@pytest.mark.parametrize("hardware", [CPU, GPU, OLD_GPU])
def test_nothing_is_left_open(hardware: HardwareFacts) -> None:
    resolved = resolve(EngineConfig(model="m"), MODEL, hardware)
    assert all(getattr(resolved, field.name) is not None for field in fields(resolved))
    assert dict(resolved.table())["max_model_len"] == "4096"
    with pytest.raises(FrozenInstanceError):
        resolved.seed = 1  # type: ignore[misc]


def test_dtype_follows_the_checkpoint_and_the_machine() -> None:
    auto = EngineConfig(model="m")
    assert resolve(auto, MODEL, GPU).dtype == "float16"
    assert resolve(auto, MODEL, CPU).dtype == "bfloat16"
    bf16 = ModelFacts(max_position_embeddings=10, dtype="bfloat16", vocab_size=1)
    assert resolve(auto, bf16, GPU).dtype == "bfloat16"
    assert resolve(auto, bf16, OLD_GPU).dtype == "float16"
    assert resolve(EngineConfig(model="m", dtype="float32"), bf16, GPU).dtype == "float32"


def test_memory_setting() -> None:
    assert resolve(EngineConfig(model="m"), MODEL, GPU).memory == MemorySetting("gpu_memory_utilization", 0.9)
    assert resolve(EngineConfig(model="m"), MODEL, CPU).memory == MemorySetting("kv_cache_memory_bytes", 1 << 30)
    lmdeploy = EngineConfig(model="m", cache_max_entry_count=0.8)
    assert resolve(lmdeploy, MODEL, GPU).memory == MemorySetting("cache_max_entry_count", 0.8)
