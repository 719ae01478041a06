"""Timing: the numbers are of one call, and a sweep is larger than the caches."""

import time
from pathlib import Path

import pytest
import torch

from nybble.core.errors import MeasurementError
from nybble.perf import timing
from nybble.perf.timing import marginal_seconds, num_copies, time_calls

CPU = torch.device("cpu")


def test_a_call_is_timed_whatever_the_number_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_REPEAT_SECONDS", 0.01)
    for copies in (1, 3):
        found = time_calls([lambda: time.sleep(0.002)] * copies, CPU, repeats=3)
        assert len(found.seconds) == 3
        assert min(found.seconds) >= 0.002
        assert found.median == sorted(found.seconds)[1]


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never one weight in a loop."""
    monkeypatch.setattr(timing, "CPU_REPEAT_SECONDS", 0.0)
    seen: list[str] = []
    time_calls([lambda: seen.append("a"), lambda: seen.append("b")], CPU, repeats=2)
    assert "".join(seen) == "ab" * (len(seen) // 2)
    assert len(seen) == 2 * (2 + 2)  # two sweeps to warm up and to find the number, one a repeat


def test_copies_fill_the_cache_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 30_000_000)
    assert num_copies(0, CPU) == 1  # nothing to copy
    assert num_copies(17_000_000, CPU) == 8  # 4 × 30 MB / 17 MB, rounded up
    assert num_copies(500_000_000, CPU) == 1
    assert num_copies(100, CPU) == timing.MOST_COPIES
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 40)
    assert num_copies(1 << 30, CPU) == 2  # MOST_BYTES


def test_the_last_cache_of_a_cpu_is_found() -> None:
    assert timing.cache_bytes(CPU) >= 1 << 18 or not Path("/sys/devices/system/cpu/cpu0/cache").exists()


def test_what_a_replay_costs_once_is_left_out() -> None:
    once_ms, call_ms = 0.011, 0.004
    short, long = once_ms + 64 * call_ms, once_ms + 128 * call_ms
    assert marginal_seconds(short, long, num_calls=64) == pytest.approx(call_ms / 1e3)
    with pytest.raises(MeasurementError, match="another program"):
        marginal_seconds(1.0, 0.9, num_calls=64)


@pytest.mark.gpu
def test_a_gpu_reads_distinct_weights_no_faster_than_its_memory() -> None:
    device = torch.device("cuda")
    weight_bytes = 16 << 20
    copies = num_copies(weight_bytes, device)
    weights = [torch.randn(weight_bytes // 4, device=device) for _ in range(copies)]
    out = torch.empty((), device=device)
    calls = [lambda weight=weight: torch.sum(weight, dim=0, out=out) for weight in weights]
    cold = time_calls(calls, device, repeats=5).median
    warm = time_calls(calls[:1], device, repeats=5).median
    assert weight_bytes / cold < 6e12  # no GPU's memory gives more yet
    assert warm < cold
