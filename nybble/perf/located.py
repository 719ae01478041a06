"""`located`: a model's shape and the engine's settings for it, decided without loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from nybble.bench.synthetic import synthetic_directory
from nybble.build import find_hardware
from nybble.core.config import EngineConfig, ResolvedConfig, resolve
from nybble.models.checkpoint import Checkpoint
from nybble.perf.model_shape import ModelShape, read_checkpoint


def located(model: str | None, synthetic: str | None, engine: Mapping[str, Any]) -> tuple[ModelShape, ResolvedConfig]:
    """Of a model (its weights are not downloaded) or of a known shape.

    Raises:
        ConfigError, ModelError: as `build` would.
    """
    with nullcontext(model) if synthetic is None else synthetic_directory(synthetic) as path:
        config = EngineConfig.from_settings(model=path, **{**engine, "load_format": "dummy"})
        checkpoint = Checkpoint.locate(config)
        return read_checkpoint(checkpoint), resolve(config, checkpoint.facts(), find_hardware(config))
