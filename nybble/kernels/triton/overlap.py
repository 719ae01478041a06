"""Programmatic dependent launch: a kernel's launch, and what it may do beforehand, overlap the end of the one before.

A small kernel of a decode step computes for a microsecond and would wait for its launch about as long. Kernels whose
first statement is `begin(OVERLAP)` and that are launched with `options(device)` let their successor start at once and
wait for their predecessor's results, whatever it was. Hopper and newer; elsewhere both do nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Nothing that an earlier kernel reads or writes may be touched before this."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@functools.cache
def is_available(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel that has the parameter OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if is_available(device) else {"OVERLAP": False}
