"""The few environment variables nybble reads. HF_TOKEN, HF_HUB_OFFLINE and HF_HOME are huggingface_hub's."""

from __future__ import annotations

import os
from pathlib import Path

from nybble.core.errors import ConfigError


def cache_dir() -> Path:
    """Where compiled kernels are kept: NYBBLE_CACHE_DIR, else ~/.cache/nybble."""
    return Path(os.environ.get("NYBBLE_CACHE_DIR") or Path.home() / ".cache" / "nybble")


def log_level() -> str:
    """NYBBLE_LOG: debug, info, warning (default) or error."""
    level = os.environ.get("NYBBLE_LOG", "warning").lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"NYBBLE_LOG must be debug, info, warning or error, got {level!r}")
    return level


def log_format() -> str:
    """NYBBLE_LOG_FORMAT: text (default) or json."""
    kind = os.environ.get("NYBBLE_LOG_FORMAT", "text").lower()
    if kind not in ("text", "json"):
        raise ConfigError(f"NYBBLE_LOG_FORMAT must be text or json, got {kind!r}")
    return kind
