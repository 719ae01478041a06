"""`ModelShape`: a decoder's linears, how each is stored, and its attention: what the costs of a step are drawn from.

Read from config.json alone (and, where the weights are there, from the headers of their files); no tensor is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nybble import formats
from nybble.core.config import EngineConfig
from nybble.core.errors import ConfigError, ModelError
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import DecoderConfig
from nybble.models.load import open_files
from nybble.models.registry import family_of


@dataclass(frozen=True)
class LinearShape:
    """y [M, N] = x [M, K] · Wᵀ, as one device of `split_by` has it.

    Args:
        group_size: of 4-bit weights along K; None: dense, in the compute type.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int | None
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def num_quantized_weights(self) -> int:
        """Those of 4 bits: all, or none."""
        return 0 if self.group_size is None else self.num_weights

    def num_bytes(self, itemsize: int) -> int:
        """Of the weight: codes, scales in the compute type, half-byte zeros."""
        bias = self.out_features * itemsize if self.has_bias else 0
        if self.group_size is None:
            return self.num_weights * itemsize + bias
        groups = self.num_weights // self.group_size
        return self.num_weights // 2 + groups * itemsize + groups // 2 + bias


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All that a step's cost depends on. `linears` are those of all layers, each with how often it occurs."""

    config: DecoderConfig
    linears: tuple[tuple[LinearShape, int], ...]
    lm_head: LinearShape
    num_devices: int = 1

    @staticmethod
    def read(hf: Mapping[str, Any], stored: Container[str] | None = None) -> ModelShape:
        """From config.json.

        Args:
            stored: names of the checkpoint's tensors, which tell how each linear is stored; None: config.json tells.

        Raises:
            ModelError, UnsupportedError: what `build` would raise.
        """
        config = family_of(hf).read_config(hf)
        quantization = formats.from_hf(hf)

        def shape(name: str, path: str, in_features: int, out_features: int, has_bias: bool) -> LinearShape:
            group = getattr(quantization.format_of(path, in_features, stored), "group_size", None)
            return LinearShape(name, in_features, out_features, in_features if group == -1 else group, has_bias)

        counts: Counter[LinearShape] = Counter()
        for layer in range(config.num_layers):
            for name, path, in_features, out_features, has_bias in _layer_linears(config):
                counts[shape(name, f"model.layers.{layer}.{path}", in_features, out_features, has_bias)] += 1
        tied = config.tie_word_embeddings
        head = (
            LinearShape("lm_head", config.hidden_size, config.vocab_size, None)
            if tied
            else shape("lm_head", "lm_head", config.hidden_size, config.vocab_size, False)
        )
        return ModelShape(config=config, linears=tuple(counts.items()), lm_head=head)

    def split_by(self, num_devices: int) -> ModelShape:
        """One device's part in tensor parallel: heads, MLP and vocabulary are divided, norms are not.

        Raises:
            ConfigError: the sizes cannot be divided so.
        """
        if num_devices == 1:
            return self
        config = self.config
        for name, size in (("attention heads", config.num_heads), ("MLP features", config.intermediate_size)):
            if size % num_devices:
                raise ConfigError(f"--num-devices {num_devices}: the model's {size} {name} are no multiple of it")
        if config.num_kv_heads % num_devices and num_devices % config.num_kv_heads:
            raise ConfigError(
                f"--num-devices {num_devices}: the model's {config.num_kv_heads} KV heads can be neither divided among "
                "them nor repeated evenly"
            )
        linears = tuple((_split(linear, num_devices, config), count) for linear, count in self.linears)
        head = _split(self.lm_head, num_devices, config)
        return ModelShape(config=config, linears=linears, lm_head=head, num_devices=num_devices)

    @property
    def num_heads(self) -> int:
        """Query heads of one device."""
        return self.config.num_heads // self.num_devices

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one device: at least one, then kept on several devices."""
        return max(1, self.config.num_kv_heads // self.num_devices)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Keys and values of all layers, on one device."""
        return 2 * self.config.num_layers * self.num_kv_heads * self.config.head_dim * itemsize

    def weight_bytes(self, itemsize: int) -> int:
        """What one device holds: linears, norms, the embedding (whole on each device), the output layer."""
        config = self.config
        linears = sum(linear.num_bytes(itemsize) * count for linear, count in self.linears)
        norms = (2 * config.num_layers + 1) * config.hidden_size * itemsize
        norms += 2 * config.num_layers * config.head_dim * itemsize if config.qk_norm else 0
        embedding = config.vocab_size * config.hidden_size * itemsize
        head = 0 if config.tie_word_embeddings and self.num_devices == 1 else self.lm_head.num_bytes(itemsize)
        return linears + norms + embedding + head

    @property
    def num_weights(self) -> int:
        """Of the layers' linears and the output layer, on one device."""
        return self.lm_head.num_weights + sum(linear.num_weights * count for linear, count in self.linears)

    @property
    def num_quantized_weights(self) -> int:
        """Those of them that are of 4 bits."""
        return self.lm_head.num_quantized_weights + self.num_quantized_layer_weights

    @property
    def num_quantized_layer_weights(self) -> int:
        """The same without the output layer."""
        return sum(linear.num_quantized_weights * count for linear, count in self.linears)


def read_model(model: str, **where: str) -> ModelShape:
    """The shape of a model directory, of `tiny`, or of a Hugging Face id whose config.json is fetched.

    Args:
        where: `revision` and `download_dir` of `EngineConfig`.

    Raises:
        ModelError, UnsupportedError: there is none, or nybble does not run it.
    """
    checkpoint = Checkpoint.locate(EngineConfig.from_settings(model=model, load_format="dummy", **where))
    return read_checkpoint(checkpoint)


def read_checkpoint(checkpoint: Checkpoint) -> ModelShape:
    """The same of a checkpoint; where its weights are there, they tell how linears are stored."""
    try:
        with open_files(checkpoint) as files:
            return ModelShape.read(checkpoint.hf, {name for file in files for name in file.entries})
    except ModelError:  # config.json alone
        if any(Path(checkpoint.path).glob("*.safetensors")):
            raise
        return ModelShape.read(checkpoint.hf)


def _layer_linears(config: DecoderConfig) -> list[tuple[str, str, int, int, bool]]:
    """Name, a part's path, in and out features, bias: of one layer, as nybble fuses them."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    return [
        ("qkv", "self_attn.q_proj", hidden, heads + 2 * kv, config.qkv_bias),
        ("o", "self_attn.o_proj", heads, hidden, config.output_bias),
        ("gate_up", "mlp.gate_proj", hidden, 2 * config.intermediate_size, config.mlp_bias),
        ("down", "mlp.down_proj", config.intermediate_size, hidden, config.mlp_bias),
    ]


def _split(linear: LinearShape, num_devices: int, config: DecoderConfig) -> LinearShape:
    """qkv, gate_up and lm_head by outputs, o and down by inputs. KV heads fewer than devices are repeated."""
    if linear.name in ("o", "down"):
        in_features, group_size = linear.in_features // num_devices, linear.group_size
        if group_size == linear.in_features:  # one group a column: each device has a part of it, and its scale
            group_size = in_features
        if group_size is not None and in_features % group_size:
            raise ConfigError(
                f"--num-devices {num_devices}: {linear.name} has {linear.in_features} input features in groups of "
                f"{group_size}, which do not divide so"
            )
        return replace(linear, in_features=in_features, group_size=group_size)
    if linear.name == "qkv":
        kv_heads = max(1, config.num_kv_heads // num_devices)
        out_features = (config.num_heads // num_devices + 2 * kv_heads) * config.head_dim
    else:
        out_features = -(-linear.out_features // num_devices)
    return replace(linear, out_features=out_features)
