"""What this machine reads and computes at the most, found in the same run as the figures that are held against it.

    read rate: sum a buffer far larger than the caches; every byte is read once and nothing is written
    math rate: 2·n³ / time of one n × n × n product

Each is the best of several repeats after a warm-up: a ceiling is what is possible, not what is usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nybble.kernels import triton

REPEATS = 5
GPU_BYTES, CPU_BYTES = 4 << 30, 256 << 20
GPU_SIZE, CPU_SIZE = 8192, 1024


@dataclass(frozen=True)
class Ceilings:
    """Per second; `how` says how they were found."""

    read_bytes_per_second: float
    flops_per_second: float
    how: str


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes a second or two, and up to 4 GiB of the device's memory.

    Args:
        dtype: of the product's factors.
    """
    on_gpu = device.type == "cuda"
    num_bytes = min(GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 2 >> 20 << 20) if on_gpu else CPU_BYTES
    read_seconds = _gpu_read_seconds(device, num_bytes) if on_gpu else _cpu_read_seconds(num_bytes)
    size = GPU_SIZE if on_gpu else CPU_SIZE
    math_seconds = _product_seconds(device, dtype, size)
    if on_gpu:
        torch.cuda.empty_cache()  # a model wants the memory
    how = (
        f"reading {num_bytes / 1e9:.2f} GB, and a {str(dtype)[6:]} product of {size}³; "
        f"the best of {REPEATS}{'' if on_gpu else f', {torch.get_num_threads()} threads'}"
    )
    return Ceilings(num_bytes / read_seconds, 2 * size**3 / math_seconds, how)


def _gpu_read_seconds(device: torch.device, num_bytes: int) -> float:
    buffer = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    if triton.missing_tools() is not None:
        return _best_seconds(device, buffer.sum)
    read = triton.deferred("read_stream", "read_stream")
    return _best_seconds(device, lambda: read(buffer))


def _cpu_read_seconds(num_bytes: int) -> float:
    return _best_seconds(torch.device("cpu"), torch.rand(num_bytes // 4).sum)


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _best_seconds(device, lambda: torch.mm(a, b, out=out))


def _best_seconds(device: torch.device, run: Callable[[], object]) -> float:
    run()
    run()
    return min(_seconds(device, run) for _ in range(REPEATS))


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """By events on a GPU, whose clock does not see the launch."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end_event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) * 1e-3
