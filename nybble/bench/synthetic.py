"""Directories with the config of a well-known model's shape and nothing else: for `load_format = dummy`.

Speed depends on shapes and formats, not on what the weights are, so a machine can be measured without a download.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nybble.core.errors import ConfigError

AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "torch_dtype": "float16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "quantization_config": AWQ,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
    "torch_dtype": "float16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "quantization_config": AWQ,
}


def _config(
    common: dict[str, Any], hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    return common | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": hidden < 3000,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b-awq": _config(QWEN2, 896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b-awq": _config(QWEN2, 1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-7b-awq": _config(QWEN2, 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b-awq": _config(QWEN2, 5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b-awq": _config(QWEN2, 5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b-awq": _config(QWEN2, 8192, 29696, 80, 64, 8, 152064),
    "llama-3-8b-awq": _config(LLAMA3, 4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b-awq": _config(LLAMA3, 8192, 28672, 80, 64, 8, 128256),
}


def synthetic_config(name: str) -> dict[str, Any]:
    """config.json of a synthetic model.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in CONFIGS:
        raise ConfigError(f"--synthetic {name}: there are {', '.join(CONFIGS)}")
    return CONFIGS[name]


@contextmanager
def synthetic_directory(name: str) -> Iterator[str]:
    """A directory with that config, gone at the end."""
    config = synthetic_config(name)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as path:
        (Path(path) / "config.json").write_text(json.dumps(config))
        yield path
