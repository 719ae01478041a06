"""From flags to points: streams, rates, a trace's times, and a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from nybble.bench.points import Point
from nybble.bench.results import ResultsFile
from nybble.commands.bench_options import parse_counts, parse_rates
from nybble.core.errors import ConfigError

SATURATED = 1.05
"""A sweep ends where twice the load brings less than this much more throughput."""


def parse_points(
    concurrency: str | None, request_rate: str | None, num_prompts: int | None, num_entries: int | None
) -> list[Point]:
    """Points of plain closed or open loops."""
    return make_points(
        parse_counts("--concurrency", concurrency) if concurrency else [],
        parse_rates("--request-rate", request_rate) if request_rate else [],
        {"end_rate": None, "concurrency": None},
        num_prompts,
        None,
        1.0,
        num_entries,
        is_sweep=False,
    )


def make_points(
    streams: list[int],
    rates: list[float],
    open_loop: dict[str, Any],
    num_prompts: int | None,
    trace: list[float] | None,
    trace_speed: float,
    num_entries: int | None,
    *,
    is_sweep: bool,
) -> list[Point]:
    """The points that flags ask for. `open_loop`: fields of `Point` that go with rates.

    Raises:
        ConfigError: flags contradict each other.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ConfigError("--num-prompts must be at least 1")
    if streams and rates:
        raise ConfigError(
            "--concurrency is a closed loop, --request-rate an open one: give one (and --max-concurrency)"
        )
    if not rates and (open_loop["end_rate"] is not None or (open_loop["concurrency"] and trace is None)):
        raise ConfigError("--ramp-to and --max-concurrency go with --request-rate")
    if is_sweep and (len(streams) > 1 or len(rates) > 1 or open_loop["end_rate"] is not None):
        raise ConfigError("--sweep begins at one --concurrency or --request-rate, and has no ramp")
    if open_loop["end_rate"] is not None and not 0 < open_loop["end_rate"] < float("inf"):
        raise ConfigError("--ramp-to must be above 0")
    if streams or (not rates and trace is None):
        streams = streams or [1]
        return [Point(num_prompts=num_prompts or num_entries or max(32, 4 * n), concurrency=n) for n in streams]
    if rates:
        return [Point(num_prompts=num_prompts or num_entries or 100, request_rate=rate, **open_loop) for rate in rates]
    assert trace is not None
    return [
        Point(
            num_prompts=min(num_prompts or len(trace), len(trace)),
            is_trace=True,
            trace_speed=trace_speed,
            concurrency=open_loop["concurrency"],
        )
    ]


def swept(point: Point, results: ResultsFile) -> Iterator[Point]:
    """Twice the load each time, until throughput grows by less than a twentieth."""
    before = 0.0
    while True:
        yield point
        row = next((row for row in results.rows() if row["label"] == point.label), None)
        if row is None or row["failed"] or row["output_throughput"] < before * SATURATED:
            return
        before = row["output_throughput"]
        if point.request_rate is not None:
            changes: dict[str, Any] = {"request_rate": point.request_rate * 2}
        else:
            assert point.concurrency is not None
            changes = {
                "concurrency": point.concurrency * 2,
                "num_prompts": max(point.num_prompts, 8 * point.concurrency),
            }
        point = msgspec.structs.replace(point, **changes)
