"""`Setting`: one recommendation with its reason, and the command that several make."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A recommendation; `name` is nybble's (vLLM's) name of the setting."""

    name: str
    value: Any
    why: str


def serve_command(model: str, settings: Sequence[Setting], *, on_gpu: bool = True) -> str:
    """The line, for a shell, that starts a server so."""
    flags = (
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
    )
    given = [f"--{setting.name.replace('_', '-')} {setting.value}" for setting in settings if setting.name in flags]
    return " ".join(["nybble serve", shlex.quote(model), *([] if on_gpu else ["--device cpu"]), *given])
