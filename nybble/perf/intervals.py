"""`Interval`: something ran from here to there. What each is to blame for, and a Chrome trace of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.perf.step_cost import Kind


@dataclass(frozen=True, order=True)
class Interval:
    """Seconds on one clock."""

    begin: float
    end: float
    part: str
    kind: Kind


@dataclass(frozen=True)
class Blamed:
    """An interval, and the seconds of wall time that are its own."""

    interval: Interval
    seconds: float


def blame_queued(intervals: Iterable[Interval]) -> list[Blamed]:
    """For kernels of one queue: where two overlap, the later one waits for the earlier (programmatic dependent launch
    starts a kernel before the one ahead of it is done), so the time is the earlier one's."""
    blamed, covered = [], float("-inf")
    for interval in sorted(intervals):
        blamed.append(Blamed(interval, max(0.0, interval.end - max(interval.begin, covered))))
        covered = max(covered, interval.end)
    return blamed


def blame_nested(intervals: Iterable[Interval]) -> list[Blamed]:
    """For calls that call each other: the time is the innermost one's."""
    ordered = sorted(intervals, key=lambda interval: (interval.begin, -interval.end))
    own = [interval.end - interval.begin for interval in ordered]
    open_calls: list[int] = []
    for index, interval in enumerate(ordered):
        while open_calls and ordered[open_calls[-1]].end <= interval.begin:
            open_calls.pop()
        if open_calls:
            own[open_calls[-1]] -= interval.end - interval.begin
        open_calls.append(index)
    return [Blamed(interval, max(0.0, seconds)) for interval, seconds in zip(ordered, own, strict=True)]


def write_trace(path: Path, tracks: dict[str, Sequence[Interval]]) -> None:
    """Chrome's trace format (chrome://tracing, ui.perfetto.dev): one row for each name of `tracks`."""
    first = min((interval.begin for intervals in tracks.values() for interval in intervals), default=0.0)
    events: list[dict[str, Any]] = []
    for number, (name, intervals) in enumerate(tracks.items()):
        place = {"pid": 0, "tid": number}
        events.append({"ph": "M", "name": "thread_name", "args": {"name": name}, **place})
        for interval in intervals:
            times = {"ts": (interval.begin - first) * 1e6, "dur": (interval.end - interval.begin) * 1e6}
            events.append({"ph": "X", "name": interval.part, "cat": interval.kind, **times, **place})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), "utf-8")
