"""`MetricsWatch`: the engine's own /metrics while a load runs: peaks of its gauges, what its counters gained."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import suppress
from typing import Any, Self

from nybble.bench.connection import Disconnected
from nybble.bench.http_reader import MalformedResponse
from nybble.bench.target import Target, TargetSettings
from nybble.core import machine

INTERVAL = 1.0
"""Seconds between looks; rendering its metrics costs a server some milliseconds, so not too often."""
# Ours and vLLM's names, without the prefix: peak of the sum over labels.
GAUGES = {
    "kv_cache_usage_perc": "peak_kv_cache_usage",
    "gpu_cache_usage_perc": "peak_kv_cache_usage",
    "num_requests_running": "peak_running",
    "num_requests_waiting": "peak_waiting",
    "process_resident_memory_bytes": "peak_resident_bytes",
}
SLOW = ("peak_resident_bytes", "peak_gpu_memory_mib")
"""Peaks that a look before or after the load sees as well: memory stays with those who took it."""
COUNTERS = {
    "prefix_cache_queries_total": "prefix_cache_query_tokens",
    "prefix_cache_hits_total": "prefix_cache_hit_tokens",
    "num_preemptions_total": "preemptions",
}
_SAMPLE = re.compile(r"^(?:\w+:)?(\w+)(?:\{[^}]*\})? ([-+.\deE]+)", re.MULTILINE)


class MetricsWatch:
    """Polls from a thread of its own while it is entered. `found` is empty for a server without /metrics.

    Args:
        is_local: the server is on this machine, whose GPUs' memory is looked at too.
    """

    def __init__(self, settings: TargetSettings, *, is_local: bool) -> None:
        self._settings = settings
        self._is_local = is_local
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), daemon=True)
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._num_looks = 0  # while the load ran

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def found(self) -> dict[str, Any]:
        gained = {name: self._last[name] - before for name, before in self._first.items() if name in self._last}
        peaks = {name: peak for name, peak in self._peaks.items() if self._num_looks or name in SLOW}
        found: dict[str, Any] = {**peaks, **gained}
        if queries := gained.get("prefix_cache_query_tokens"):
            found["prefix_cache_hit_rate"] = gained.get("prefix_cache_hit_tokens", 0.0) / queries
        return found

    async def _watch(self) -> None:
        target = Target(self._settings)
        try:
            self._look_at_gpus()
            await self._look(target)
            # A gauge's peak is known by looks while the load runs; a run shorter than INTERVAL has none.
            while not await asyncio.to_thread(self._stop.wait, INTERVAL):
                await self._look(target)
                self._num_looks += 1
            await self._look(target)
            self._look_at_gpus()
        finally:
            target.close()

    def _look_at_gpus(self) -> None:
        """Before and after only: engines take their memory at start, and asking the driver holds up its other users."""
        if self._is_local and (used := machine.gpu_memory_used_mib()) is not None:
            self._peak("peak_gpu_memory_mib", used)

    async def _look(self, target: Target) -> None:
        with suppress(OSError, Disconnected, MalformedResponse, TimeoutError):
            status, body = await target.fetch("/metrics")
            if status == 200:
                self._take(body.decode("utf-8", "replace"))

    def _take(self, text: str) -> None:
        sums: dict[str, float] = {}
        for name, value in _SAMPLE.findall(text):
            with suppress(ValueError):
                if name in GAUGES or name in COUNTERS:
                    sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in sums.items():
            if name in GAUGES:
                self._peak(GAUGES[name], value)
            else:
                self._first.setdefault(COUNTERS[name], value)
                self._last[COUNTERS[name]] = value

    def _peak(self, name: str, value: float) -> None:
        self._peaks[name] = max(value, self._peaks.get(name, value))
