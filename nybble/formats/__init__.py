"""Checkpoint formats: which one each linear of a model is stored in, read from `quantization_config`."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import ModelError, UnsupportedError
from nybble.formats.awq import Awq
from nybble.formats.dense import Dense
from nybble.formats.format import Format
from nybble.formats.gptq import Gptq

GROUP_SIZES = (32, 64, 128, -1)
ACCEPTED = "accepted are dense weights, AWQ (4 bit, version gemm) and GPTQ (4 bit, no activation order)"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The format of each linear. `skipped` are patterns of names that `quantized` does not apply to."""

    quantized: Format | None = None
    skipped: tuple[re.Pattern[str], ...] = ()
    only: tuple[str, ...] = ()  # if given, just names that end so are quantized
    lm_head: bool = False

    def format_of(self, linear: str, in_features: int, stored: Container[str] | None) -> Format:
        """The format of the linear with this name.

        What is stored decides, where there are files: writers read `modules_to_not_convert` differently (as a part of
        the name, as its beginning, as a regular expression). Without files (dummy weights) the configuration decides.
        """
        if self.quantized is None:
            return Dense()
        if stored is not None:
            tensors = self.quantized.tensors(in_features, bias=False)
            names = [f"{linear}.{tensor.name}" for tensor in tensors if tensor.name != "bias"]
            return self.quantized if any(name in stored for name in names) else Dense()
        if linear == "lm_head" and not self.lm_head:
            return Dense()
        if self.only and not linear.endswith(self.only):
            return Dense()
        return Dense() if any(pattern.search(linear) for pattern in self.skipped) else self.quantized


def from_hf(config: Mapping[str, Any]) -> Quantization:
    """Read the `quantization_config` of a config.json.

    Raises:
        UnsupportedError: a method, bit width, group size or layout that nybble does not run; names the field.
        ModelError: a field is nonsense.
    """
    settings = config.get("quantization_config")
    if not settings:
        return Quantization()
    if not isinstance(settings, Mapping):
        raise ModelError(f"quantization_config must be an object, got {settings!r}; {ACCEPTED}")
    method = str(settings.get("quant_method", "")).lower()
    readers = {"awq": _awq, "gptq": _gptq}
    if method not in readers:
        raise UnsupportedError(f"quantization_config.quant_method is {method!r}; {ACCEPTED}")
    return readers[method](settings)


def _awq(settings: Mapping[str, Any]) -> Quantization:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise UnsupportedError(f"quantization_config.version is {version!r}; AWQ is accepted in version 'gemm'")
    if str(settings.get("backend", "")).lower() == "llm-awq":
        raise UnsupportedError(
            "quantization_config.backend is 'llm-awq', another bit layout; re-export as version gemm"
        )
    _check_bits(settings.get("bits", settings.get("w_bit", 4)))
    group_size = _group_size(settings.get("group_size", settings.get("q_group_size", 128)))
    skipped = tuple(re.compile(re.escape(name)) for name in _names(settings, "modules_to_not_convert"))
    return Quantization(quantized=Awq(group_size, zero_point=bool(settings.get("zero_point", True))), skipped=skipped)


def _gptq(settings: Mapping[str, Any]) -> Quantization:
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"quantization_config.checkpoint_format is {layout!r}; GPTQ is accepted as 'gptq' or 'gptq_v2'"
        )
    if settings.get("is_marlin_format"):
        raise UnsupportedError("quantization_config.is_marlin_format is true; GPTQ is accepted as 'gptq' or 'gptq_v2'")
    if settings.get("desc_act"):
        raise UnsupportedError(
            "quantization_config.desc_act is true: input features are ordered by activation; "
            "GPTQ is accepted with desc_act = false"
        )
    _check_bits(settings.get("bits", 4))
    return Quantization(
        quantized=Gptq(_group_size(settings.get("group_size", 128)), zeros_minus_one=layout == "gptq"),
        skipped=_dynamic_exclusions(settings),
        only=_names(settings, "modules_in_block_to_quantize"),
        lm_head=bool(settings.get("lm_head", False)),
    )


def _dynamic_exclusions(settings: Mapping[str, Any]) -> tuple[re.Pattern[str], ...]:
    """GPTQModel's `dynamic`: "-:pattern" leaves linears dense, any other pattern gives them their own settings."""
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ModelError(f"quantization_config.dynamic must be an object, got {dynamic!r}")
    skipped = []
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            try:
                skipped.append(re.compile(rf"\A(?:{pattern[2:]})"))
            except (re.error, RecursionError, OverflowError) as error:
                raise ModelError(
                    f"quantization_config.dynamic: {pattern!r} is no regular expression ({error})"
                ) from None
        elif changes:
            raise UnsupportedError(
                f"quantization_config.dynamic gives {pattern!r} its own settings; only exclusions ('-:…') are accepted"
            )
    return tuple(skipped)


def _names(settings: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A field that holds a list of names, or a list of such lists."""
    value = settings.get(field) or []
    blocks = value if isinstance(value, list) else [None]
    names: list[Any] = [name for block in blocks for name in (block if isinstance(block, list) else [block])]
    if not all(isinstance(name, str) for name in names):
        raise ModelError(f"quantization_config.{field} must be a list of names, got {value!r}")
    return tuple(names)


def _check_bits(bits: object) -> None:
    if bits != 4:
        raise UnsupportedError(f"quantization_config.bits is {bits!r}; 4 is accepted")


def _group_size(value: object) -> int:
    if not isinstance(value, int) or value not in GROUP_SIZES:
        raise UnsupportedError(
            f"quantization_config.group_size is {value!r}; accepted are {', '.join(map(str, GROUP_SIZES))}"
        )
    return value
