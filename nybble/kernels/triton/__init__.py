"""Triton implementations, one file an operation: fused kernels for CUDA GPUs of compute capability 8.0 and newer.

Triton exists on Linux only and takes a second to import, so nothing here is imported before its first launch: operation
files name a function by `deferred` and ask `why_not`, which looks without importing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nybble.kernels.op import Spec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def deferred(module: str, function: str = "launch") -> Callable[..., Any]:
    """`nybble.kernels.triton.<module>.<function>`, imported at its first call."""

    @functools.cache
    def resolve() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"nybble.kernels.triton.{module}"), function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return resolve()(*args, **kwargs)

    return call


@functools.cache
def missing_tools() -> str | None:
    """What Triton lacks on this machine to compile and launch a kernel, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        return "Triton needs a C compiler (install gcc or clang, or set CC)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton needs Python's headers (install python3-dev)"
    return None


def why_not(spec: Spec) -> str | None:
    """`supports` of every Triton implementation."""
    if spec.device.type != "cuda":
        return "Triton kernels run on CUDA GPUs"
    if spec.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {spec.capability[0]}.{spec.capability[1]}"
    if spec.dtype not in DTYPES:
        return f"computes in fp16, bf16 or fp32, not {spec.dtype}"
    return missing_tools()
