"""`DecoderConfig`: the checked contents of a config.json, as far as nybble's model families need them.

config.json is read directly and not through transformers: importing that takes longer (1.5 s) than starting a small
model, its defaults move between releases, and it would hand out objects with whatever attributes a file invents. Here
each field is named, checked once, and an error says which field is wrong. Old spellings (`rope_scaling`, `rope_theta`)
and new ones (`rope_parameters`) are both understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from nybble.core.errors import ModelError, UnsupportedError
from nybble.layers.rope import Rope, RopeType

HfConfig = Mapping[str, Any]

LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 4096  # some things are built for each layer before the files are compared with config.json

OPTIONAL_ROPE_NUMBERS = (
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and a gated MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int  # after rope scaling
    rope: Rope
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys are normed head by head
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # one a layer


def read_decoder(hf: HfConfig, **family: Any) -> DecoderConfig:
    """Read the fields that all families share.

    Args:
        family: fields of `DecoderConfig` that the family decides (biases, sliding windows).

    Raises:
        ModelError: a field is missing or nonsense.
        UnsupportedError: an activation or rope type that nybble does not run.
    """
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise UnsupportedError(f"config.json: hidden_act is {activation!r}; 'silu' is accepted")
    hidden_size, num_heads = positive(hf, "hidden_size"), positive(hf, "num_attention_heads")
    num_kv_heads = positive(hf, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
        )
    head_dim = positive(hf, "head_dim", hidden_size // num_heads)
    if head_dim % 2 or head_dim < 4:
        raise ModelError(f"config.json: head_dim = {head_dim} must be even and at least 4 for rotary positions")
    num_layers = count_layers(hf)
    rope, max_position_embeddings = read_rope(hf)
    return DecoderConfig(
        vocab_size=positive(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(hf, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
        tie_word_embeddings=flag(hf, "tie_word_embeddings"),
        max_position_embeddings=max_position_embeddings,
        rope=rope,
        **{"sliding_windows": (None,) * num_layers} | family,
    )


def read_rope(hf: HfConfig) -> tuple[Rope, int]:
    """The rope settings, and how many positions they make usable."""
    settings = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise ModelError(f"config.json: rope_scaling must be an object, got {settings!r}")
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise UnsupportedError("config.json: rope_parameters differ by layer type; one set for all layers is accepted")
    rope_type = settings.get("rope_type", settings.get("type")) or "default"
    if rope_type not in get_args(RopeType):
        raise UnsupportedError(
            f"config.json: rope type {rope_type!r} is not supported; accepted are {', '.join(get_args(RopeType))}"
        )
    if number(settings, "partial_rotary_factor", number(hf, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("config.json: partial_rotary_factor other than 1 is not supported")
    limit = positive(hf, "max_position_embeddings")
    # The trained length. Linear and dynamic scaling count from max_position_embeddings, whatever else is written.
    original = limit
    if rope_type in ("llama3", "yarn"):
        outer = positive(hf, "original_max_position_embeddings", limit)
        original = positive(settings, "original_max_position_embeddings", outer)
    default_factor = limit / original if rope_type == "yarn" else None
    optional = {name: number(settings, name) for name in OPTIONAL_ROPE_NUMBERS if settings.get(name) is not None}
    rope = Rope(
        rope_type=rope_type,
        rope_theta=number(settings, "rope_theta", number(hf, "rope_theta", 10_000.0)),
        factor=1.0 if rope_type == "default" else number(settings, "factor", default_factor),
        original_max_position_embeddings=original,
        truncate=bool(settings.get("truncate", True)),
        **optional,
    )
    if rope.rope_theta <= 1 or rope.factor < 1 or rope.high_freq_factor <= rope.low_freq_factor:
        raise ModelError(
            f"config.json: rope needs rope_theta > 1, factor ≥ 1 and high_freq_factor > low_freq_factor, got {rope}"
        )
    # llama3 files state the stretched length; files of the other types mostly the one before.
    usable = limit if rope_type in ("default", "llama3") else max(limit, int(min(original * rope.factor, LARGEST_SIZE)))
    return rope, usable


def count_layers(hf: HfConfig) -> int:
    num_layers = positive(hf, "num_hidden_layers")
    if num_layers > MOST_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers = {num_layers}; at most {MOST_LAYERS} are accepted")
    return num_layers


def positive(fields: HfConfig, name: str, default: int | None = None) -> int:
    """A positive integer field; a missing or null one has the default, or is an error without one."""
    value = fields.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
        raise ModelError(f"config.json: {name} must be a positive integer below 2³¹, got {fields.get(name)!r}")
    return value


def number(fields: HfConfig, name: str, default: float | None = None) -> float:
    """A positive number, likewise. Nothing real is near the bounds; within them no formula leaves the floats."""
    value = fields.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        raise ModelError(f"config.json: {name} must be a positive number, got {fields.get(name)!r}")
    return float(value)


def flag(fields: HfConfig, name: str) -> bool:
    """A boolean field; missing or null is False."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"config.json: {name} must be true or false, got {value!r}")
    return bool(value)


def windows_by_layer(hf: HfConfig) -> tuple[int | None, ...]:
    """Qwen's sliding windows: off unless `use_sliding_window`, then by `layer_types` or from `max_window_layers` on."""
    num_layers = count_layers(hf)
    if not flag(hf, "use_sliding_window") or hf.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(hf, "sliding_window")
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"config.json: max_window_layers must be an integer ≥ 0, got {first!r}")
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelError(f"config.json: layer_types must be a list of {num_layers} names, got {types!r}")
    windows = {"full_attention": None, "sliding_attention": window}
    for name in types:
        if not isinstance(name, str) or name not in windows:
            raise UnsupportedError(f"config.json: layer_types has {name!r}; accepted are {', '.join(windows)}")
    return tuple(windows[name] for name in types)
