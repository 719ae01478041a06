"""Settings, written once: `EngineConfig` is what the user asked, `ResolvedConfig` what the engine runs with.

A None in `EngineConfig` means "choose for me". `resolve` fills every one from the model and the device, checks what
belongs together, and returns a frozen value. Facts that are measured later (how many KV blocks fit) are return values
of whoever measures them, never edits of a config. CLI flags are generated from the fields here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Self, get_type_hints

from nybble.core.checks import Interval, fits, shown, wording
from nybble.core.errors import ConfigError

DType = Literal["float16", "bfloat16", "float32"]
Device = Literal["cpu", "cuda"]
Policy = Literal["fcfs", "priority"]

_RANGES = {
    "max_model_len": Interval(2),
    "max_num_seqs": Interval(1),
    "max_num_batched_tokens": Interval(1),
    "gpu_memory_utilization": Interval(0, 1, open_low=True),
    "cache_max_entry_count": Interval(0, 1, open_low=True, open_high=True),  # 1 would leave nothing for the step
    "kv_cache_memory_bytes": Interval(1),
    "seed": Interval(),
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to run a model. The annotation of each field is its help text."""

    model: Annotated[str, "Hugging Face id, local directory, or `tiny` (the embedded model)"]
    revision: Annotated[str | None, "branch, tag or commit of the Hugging Face repository"] = None
    download_dir: Annotated[str | None, "where to keep downloads; default: the Hugging Face cache"] = None
    load_format: Annotated[Literal["safetensors", "dummy"], "`dummy`: random weights of the right shapes"] = (
        "safetensors"
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to run"] = "auto"
    dtype: Annotated[Literal["auto", "float16", "bfloat16", "float32"], "compute type; auto: the checkpoint's"] = "auto"
    max_model_len: Annotated[int | None, "longest prompt + output in tokens; default: the model's, or what fits"] = None
    max_num_seqs: Annotated[int | None, "most sequences in one step; default: 256 on a GPU, 32 on a CPU"] = None
    max_num_batched_tokens: Annotated[int | None, "most tokens in one step; default: 8192 on a GPU, 512 on a CPU"] = (
        None
    )
    block_size: Annotated[int, "tokens in a KV block; a power of two"] = 16
    enable_prefix_caching: Annotated[bool, "reuse the KV blocks of equal prefixes"] = True
    scheduling_policy: Annotated[Policy, "first come, first served; or by the requests' priority"] = "fcfs"
    gpu_memory_utilization: Annotated[float | None, "share of the whole device nybble may fill, in (0, 1]"] = None
    cache_max_entry_count: Annotated[float | None, "share of what is free after the weights for KV, in (0, 1)"] = None
    kv_cache_memory_bytes: Annotated[int | None, "bytes for the KV cache"] = None
    enforce_eager: Annotated[bool, "capture no CUDA graphs"] = False
    kernels: Annotated[dict[str, str], "force implementations: operation=implementation"] = field(default_factory=dict)
    seed: Annotated[int, "seeds the requests that bring none"] = 0

    @classmethod
    def from_settings(cls, **settings: Any) -> Self:
        """A config of settings that come by name, from a caller's keywords or a file.

        Raises:
            ConfigError: there is no such setting, or its value is refused.
        """
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                close = get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
                raise ConfigError(f"{name} is not a setting of the engine; {hint}")
        if "model" not in settings:
            raise ConfigError("model is missing: a Hugging Face id, a local directory, or `tiny`")
        return cls(**settings)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            got = shown(self.model) if self.model != "" else "an empty string"
            raise ConfigError(f"model must be a Hugging Face id or a directory, got {got}")
        for name, kind in _bare_types().items():
            value, interval = getattr(self, name), _RANGES.get(name)
            if not fits(kind, value, interval):
                raise ConfigError(f"{name} must be {wording(kind, interval)}, got {shown(value)}")
        if self.block_size < 8 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two ≥ 8, got {self.block_size}")
        given = [
            n
            for n in ("gpu_memory_utilization", "cache_max_entry_count", "kv_cache_memory_bytes")
            if getattr(self, n) is not None
        ]
        if len(given) > 1:
            raise ConfigError(f"give at most one of the KV memory settings; got {' and '.join(given)}")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the checkpoint's config says, as far as settings depend on it."""

    max_position_embeddings: int  # after rope scaling
    dtype: DType  # the checkpoint's
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class HardwareFacts:
    """What the machine can do, as far as settings depend on it."""

    device: Device
    supports_bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """Every setting decided. `max_model_len_is_explicit` tells whether a too small KV cache may shorten the context."""

    model: str
    load_format: Literal["safetensors", "dummy"]
    device: Device
    dtype: DType
    max_model_len: int
    max_model_len_is_explicit: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    enable_prefix_caching: bool
    scheduling_policy: Policy
    memory: MemorySetting
    enforce_eager: bool
    kernels: dict[str, str]
    seed: int

    def table(self) -> list[tuple[str, str]]:
        """Name and value of each setting, for printing."""
        return [(f.name, str(getattr(self, f.name))) for f in fields(self)]


@dataclass(frozen=True)
class MemorySetting:
    """The one KV memory setting in force; its unit follows from the name."""

    name: Literal["gpu_memory_utilization", "cache_max_entry_count", "kv_cache_memory_bytes"]
    value: float

    def __str__(self) -> str:
        return f"{self.name} = {self.value:{'.0f' if self.name == 'kv_cache_memory_bytes' else 'g'}}"


DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
DEFAULT_CPU_KV_BYTES = 1 << 30


def resolve(config: EngineConfig, model: ModelFacts, hardware: HardwareFacts) -> ResolvedConfig:
    """Decide everything that `config` left open.

    Raises:
        ConfigError: a setting does not suit this model or this machine.
    """
    on_gpu = hardware.device == "cuda"
    dtype = _resolve_dtype(config, model, hardware)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len = {max_model_len} is longer than this model's {model.max_position_embeddings} positions; "
            f"use at most {model.max_position_embeddings}"
        )
    max_num_batched_tokens = config.max_num_batched_tokens or (8192 if on_gpu else 512)
    max_num_seqs = config.max_num_seqs or min(256 if on_gpu else 32, max_num_batched_tokens)
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens = {max_num_batched_tokens} is less than max_num_seqs = {max_num_seqs}: "
            f"a step must have room for one token of each sequence; raise the first or lower the second"
        )
    return ResolvedConfig(
        model=config.model,
        load_format=config.load_format,
        device=hardware.device,
        dtype=dtype,
        max_model_len=max_model_len,
        max_model_len_is_explicit=config.max_model_len is not None,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        scheduling_policy=config.scheduling_policy,
        memory=_resolve_memory(config, on_gpu),
        enforce_eager=config.enforce_eager or not on_gpu,
        kernels=dict(config.kernels),
        seed=config.seed,
    )


def _resolve_dtype(config: EngineConfig, model: ModelFacts, hardware: HardwareFacts) -> DType:
    if config.dtype == "auto":
        # CPUs have no fast fp16 arithmetic; torch's int4 operation there is made for bf16.
        wanted: DType = "bfloat16" if hardware.device == "cpu" and model.dtype == "float16" else model.dtype
        return "float16" if wanted == "bfloat16" and not hardware.supports_bfloat16 else wanted
    if config.dtype == "bfloat16" and not hardware.supports_bfloat16:
        raise ConfigError("dtype = bfloat16 needs a GPU of compute capability 8.0 or newer; use float16")
    return config.dtype


def _resolve_memory(config: EngineConfig, on_gpu: bool) -> MemorySetting:
    if config.kv_cache_memory_bytes is not None:
        return MemorySetting("kv_cache_memory_bytes", config.kv_cache_memory_bytes)
    if config.cache_max_entry_count is not None:
        return MemorySetting("cache_max_entry_count", config.cache_max_entry_count)
    if config.gpu_memory_utilization is not None:
        if not on_gpu:
            raise ConfigError(
                "gpu_memory_utilization is a share of a GPU's memory; on a CPU give kv_cache_memory_bytes"
            )
        return MemorySetting("gpu_memory_utilization", config.gpu_memory_utilization)
    if on_gpu:
        return MemorySetting("gpu_memory_utilization", DEFAULT_GPU_MEMORY_UTILIZATION)
    return MemorySetting("kv_cache_memory_bytes", DEFAULT_CPU_KV_BYTES)


@cache
def _bare_types() -> dict[str, Any]:
    return get_type_hints(EngineConfig)
