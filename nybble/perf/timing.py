"""`time_calls`: what a call costs among others, with caches as cold as between the layers of a model.

On a GPU the calls are captured in graphs of S and of 2·S sweeps over all of them; the time of one call is how much
longer the second one's replay takes, divided by the calls it has more. What a replay costs once is so left out. On a
CPU sweeps are repeated until 50 ms are over.

Each call brings its own weights. `num_copies` says how many it takes so that a sweep evicts them from the last cache.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.core.errors import MeasurementError

SWEEP_CACHES = 4  # a sweep reads as much as so many last-level caches hold
MOST_COPIES = 64
MOST_BYTES = 2 << 30
CALLS_A_GRAPH = 64  # at least, in the smaller graph: two µs each stand out from the half one that events resolve
HEAD_START_CYCLES = 2_000_000  # about a ms
CPU_REPEAT_SECONDS = 0.05
UNKNOWN_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, a value a repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def num_copies(distinct_bytes: int, device: torch.device) -> int:
    """How many copies of weights of so many bytes a sweep needs; bounded in number and in memory."""
    if distinct_bytes == 0:
        return 1
    wanted = math.ceil(SWEEP_CACHES * cache_bytes(device) / distinct_bytes)
    return max(1, min(wanted, MOST_COPIES, MOST_BYTES // distinct_bytes))


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        int(path.read_text().strip().removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if path.read_text().strip().endswith("K")
    ]
    return max(sizes, default=UNKNOWN_CACHE_BYTES)


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> Timing:
    """Time each of `repeats` repeats; all calls must do the same work, on arguments that are theirs.

    Raises:
        MeasurementError: a call cannot be captured in a CUDA graph.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _time_gpu(calls, device, repeats)
    return _time_cpu(calls, repeats)


def _time_cpu(calls: Sequence[Callable[[], object]], repeats: int) -> Timing:
    _sweep(calls, 1)  # builds kernels, touches memory
    sweeps = max(1, math.ceil(CPU_REPEAT_SECONDS / _sweep(calls, 1)))
    return Timing(tuple(_sweep(calls, sweeps) / (sweeps * len(calls)) for _ in range(repeats)))


def _sweep(calls: Sequence[Callable[[], object]], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        for call in calls:
            call()
    return time.perf_counter() - begin


def _time_gpu(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> Timing:
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    sweeps = math.ceil(CALLS_A_GRAPH / len(calls))
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles kernels and sets up libraries, neither of which a capture allows
        stream.synchronize()
        graphs = [_capture(calls, times) for times in (sweeps, 2 * sweeps)]
        marks = [[_event() for _ in range(3)] for _ in range(repeats + 1)]
        for before, between, after in marks:
            torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]  # both replays are enqueued when the first one begins
            before.record()
            graphs[0].replay()
            between.record()
            graphs[1].replay()
            after.record()
        stream.synchronize()
    pairs = [(a.elapsed_time(b), b.elapsed_time(c)) for a, b, c in marks[1:]]  # the first one warms up
    return Timing(tuple(marginal_seconds(*pair, num_calls=sweeps * len(calls)) for pair in pairs))


def marginal_seconds(short_ms: float, long_ms: float, *, num_calls: int) -> float:
    """Of one call, from a replay and one of `num_calls` more.

    Raises:
        MeasurementError: the longer one was no longer: something else disturbed them.
    """
    if long_ms <= short_ms:
        raise MeasurementError(
            f"{num_calls} calls more took {long_ms - short_ms:.4f} ms more; is another program using this GPU?"
        )
    return (long_ms - short_ms) / 1e3 / num_calls


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: kernels keep scratch memory for each stream that they meet."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _capture(calls: Sequence[Callable[[], object]], times: int) -> torch.cuda.CUDAGraph:
    """A graph of the calls in turn, on the current stream."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # a collection could free CUDA memory in the middle of a capture, which breaks it
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(times):
                for call in calls:
                    call()
        finally:
            graph.capture_end()
    except RuntimeError as error:
        raise MeasurementError(f"cannot be captured in a CUDA graph ({str(error).splitlines()[0]})") from error
    finally:
        gc.enable()
    return graph
