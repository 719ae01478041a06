"""The environment stamp: what a figure was measured on and with, so that others can repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble import __version__
from nybble.core import machine

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "msgspec",
    "pyzmq",
    "fastapi",
    "uvicorn",
    "vllm",
    "lmdeploy",
)
SECRETS = ("--api-key",)


def environment() -> dict[str, Any]:
    """Machine, processor, GPUs with clocks and driver, versions, nybble's commit, the command with its flags."""
    memory = machine.memory_bytes()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(sys.argv),
        "nybble": __version__,
        "commit": commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": machine.cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "gpus": machine.gpus(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "CUDA_VISIBLE"))},
    }


def command(arguments: Sequence[str]) -> list[str]:
    """The command line without its secrets."""
    shown = ["nybble" if Path(arguments[0]).stem in ("nybble", "__main__") else Path(arguments[0]).name]
    is_secret = False
    for argument in arguments[1:]:
        name, equals, _ = argument.partition("=")
        if is_secret:
            argument = "***"
        elif equals and name in SECRETS:
            argument = f"{name}=***"
        is_secret = argument in SECRETS
        shown.append(argument)
    return shown


def commit() -> str | None:
    """Of the checkout that this package runs from, with a mark if it was changed; None for an installed package."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        return run.stdout.strip()

    try:
        name = git("rev-parse", "HEAD")
        return (name + (" (changed)" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
