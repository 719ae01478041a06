"""Small random checkpoints, each with the transformers model that means the same.

`make_checkpoint` writes a directory in the Hugging Face layout and returns the fp32 reference. For AWQ and GPTQ the
codes are packed here, bit by bit in numpy from the formats' public descriptions, and dequantized here into the
reference: nothing is shared with `nybble.formats`, so an error on either side shows.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 64},
    "qwen3-bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "llama": {},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 64},
    "mistral": {"sliding_window": 7},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
}
"""Name → fields of config.json beside `SMALL`; the name is the model type unless a field says otherwise."""

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LEAST_GAP = 1e-4
"""Between the two best logits where greedy tokens are compared; fp32 implementations differ by a few 1e-6."""

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # output feature of each nibble, lowest bits first


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """How the decoder's linears are stored."""

    method: str  # "awq" or "gptq"
    group_size: int = 128
    symmetric: bool = False  # every zero is 8; for awq: no qzeros in the file
    checkpoint_format: str = "gptq"
    g_idx: bool = True  # gptq: write the (trivial) group indices
    zero_bias: bool = False  # gptq: write a bias of zeros everywhere, as some exporters do
    not_converted: tuple[str, ...] = ()  # parts of names that stay dense


def make_checkpoint(
    path: Path,
    family: str = "qwen2",
    *,
    quantized: Quantized | None = None,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Write a random model to `path` and return its reference: transformers, fp32, eager attention, eval.

    Args:
        family: a key of `FAMILIES`.
        dtype: of the dense tensors in the files; the reference holds the rounded values.
        fields: override config.json.
    """
    settings = {"model_type": family, **SMALL, **FAMILIES[family], **fields}
    config = AutoConfig.for_model(**settings)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        parameter.data = random_parameter(name, parameter.shape, generator).to(dtype).float()
    tensors = {name: value.to(dtype) for name, value in reference.state_dict().items()}
    if config.tie_word_embeddings:
        reference.tie_weights()
        del tensors["lm_head.weight"]
    path.mkdir(parents=True, exist_ok=True)
    reference.config.save_pretrained(path)
    extra: dict[str, Any] = {"architectures": [type(reference).__name__], "dtype": str(dtype).removeprefix("torch.")}
    if quantized is not None:
        tensors |= quantize_linears(reference, tensors, quantized, seed)
        extra["quantization_config"] = quantization_config(quantized)
    update_json(path / "config.json", **extra)
    save_tensors(path, tensors, num_shards)
    return reference


def random_parameter(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values that keep activations near unit size, so that an error anywhere moves the logits.

    Embeddings are small beside what the layers add, or a tied model would repeat its last token for ever.
    """
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    return 0.1 * noise if "embed_tokens" in name else noise * shape[-1] ** -0.5


@torch.no_grad()
def reference_logits(reference: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab]."""
    return reference(torch.tensor([token_ids])).logits[0]


@torch.no_grad()
def reference_greedy(reference: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens with transformers' own cache; nothing ends early.

    A near tie would make the right answer a matter of rounding: then the test should take another seed.
    """
    # Newer releases call the argument `cache`.
    argument = "cache" if "cache" in inspect.signature(reference.forward).parameters else "past_key_values"
    tokens, cache, out = torch.tensor([prompt]), None, []
    for _ in range(num_tokens):
        result = reference(tokens, use_cache=True, **{argument: cache})
        cache = result.past_key_values
        best, second = result.logits[0, -1].topk(2).values.tolist()
        assert best - second > LEAST_GAP, f"token {len(out)} is a near tie: choose another seed"
        out.append(int(result.logits[0, -1].argmax()))
        tokens = torch.tensor([out[-1:]])
    return out


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """One model.safetensors, or shards with an index. Tensors are dealt out in turn, so layers straddle the shards."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    weight_map = {name: files[i % num_shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def update_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def quantization_config(quantized: Quantized) -> dict[str, Any]:
    shared = {"quant_method": quantized.method, "bits": 4, "group_size": quantized.group_size}
    if quantized.method == "awq":
        skipped = list(quantized.not_converted) or None
        return shared | {
            "version": "gemm",
            "zero_point": not quantized.symmetric,
            "modules_to_not_convert": skipped,
        }
    dynamic = {f"-:.*{name}.*": {} for name in quantized.not_converted}
    fields = {"sym": quantized.symmetric, "desc_act": False, "checkpoint_format": quantized.checkpoint_format}
    return shared | fields | {"dynamic": dynamic}


def quantize_linears(
    reference: PreTrainedModel, tensors: dict[str, torch.Tensor], quantized: Quantized, seed: int
) -> dict[str, torch.Tensor]:
    """Give each decoder linear random 4-bit values: dequantized in `reference`, packed as a result, not in tensors."""
    rng = np.random.default_rng(seed)
    packed: dict[str, torch.Tensor] = {}
    for name, module in reference.model.named_modules(prefix="model"):
        if not isinstance(module, torch.nn.Linear) or any(part in name for part in quantized.not_converted):
            continue
        out_features, in_features = module.weight.shape
        group = in_features if quantized.group_size == -1 else quantized.group_size
        codes = rng.integers(0, 16, (in_features, out_features))
        shape = (in_features // group, out_features)
        zeros = np.full(shape, 8) if quantized.symmetric else rng.integers(0, 16, shape)
        scales = (rng.uniform(0.5, 1.5, shape) / (6 * in_features**0.5)).astype(np.float16)
        by_row = np.repeat(scales.astype(np.float32), group, axis=0)
        weight = (codes - np.repeat(zeros, group, axis=0)).astype(np.float32) * by_row  # [in, out]
        module.weight.data = torch.from_numpy(weight.T.copy())
        del tensors[f"{name}.weight"]
        pack = pack_awq if quantized.method == "awq" else pack_gptq
        for suffix, array in pack(codes, zeros, scales, quantized).items():
            packed[f"{name}.{suffix}"] = torch.from_numpy(array)
        if quantized.zero_bias and module.bias is None:
            packed[f"{name}.bias"] = torch.zeros(out_features, dtype=torch.float16)
    return packed


def pack_awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, quantized: Quantized) -> dict[str, np.ndarray]:
    def pack(values: np.ndarray) -> np.ndarray:
        words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
        for column in range(values.shape[1]):
            shift = 4 * AWQ_NIBBLES.index(column % 8)
            words[:, column // 8] |= values[:, column].astype(np.uint32) << shift
        return words.view(np.int32)

    tensors = {"qweight": pack(codes), "scales": scales}
    return tensors if quantized.symmetric else tensors | {"qzeros": pack(zeros)}


def pack_gptq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, quantized: Quantized) -> dict[str, np.ndarray]:
    qweight = np.zeros((codes.shape[0] // 8, codes.shape[1]), dtype=np.uint32)
    for row in range(codes.shape[0]):
        qweight[row // 8] |= codes[row].astype(np.uint32) << (4 * (row % 8))
    stored = (zeros - 1) % 16 if quantized.checkpoint_format == "gptq" else zeros
    qzeros = np.zeros((zeros.shape[0], zeros.shape[1] // 8), dtype=np.uint32)
    for column in range(zeros.shape[1]):
        qzeros[:, column // 8] |= stored[:, column].astype(np.uint32) << (4 * (column % 8))
    tensors = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales}
    if quantized.g_idx:
        group = codes.shape[0] // zeros.shape[0]
        tensors["g_idx"] = (np.arange(codes.shape[0]) // group).astype(np.int32)
    return tensors
