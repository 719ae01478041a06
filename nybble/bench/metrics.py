"""From records to numbers, under the names of vLLM's benchmark. `FORMULAS` says in words what each is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nybble.bench.record import Record

FORMULAS = {
    "ttft": "time to first token = arrival of the first event with a token − sending the request",
    "tpot": "time per output token = (last token − first token) / (output tokens − 1), of one request",
    "itl": "inter-token latency = gap between two events with tokens / tokens in the later one (1 where not told)",
    "e2el": "end-to-end latency = end of the answer − sending the request",
    "duration": "end of the last answer − sending the first request; warm-up is not in it",
    "request_throughput": "completed requests / duration",
    "output_throughput": "output tokens of completed requests / duration",
    "total_token_throughput": "(input + output tokens of completed requests) / duration",
    "request_goodput": "completed requests that kept every given objective / duration",
    "token counts": "the server's `usage`; an event is taken for a token only where the server gives none",
    "server": "peaks of its own /metrics, once a second; memory: its processes' resident set, GPU memory in use",
    "a point": "median of the repeats; spread: least and most",
}
LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (90, 95, 99)


def latencies(records: Sequence[Record]) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds, of requests that succeeded."""
    good = [record for record in records if record.failure is None and record.first_token]
    longer = [record for record in good if record.num_output_tokens > 1]
    return {
        "ttft": np.array([record.first_token - record.start for record in good]),
        "tpot": np.array([tpot(record) for record in longer]),
        "itl": np.array([gap for record in good for gap in record.gaps]),
        "e2el": np.array([record.end - record.start for record in good]),
    }


def tpot(record: Record) -> float:
    """Seconds a token after the first."""
    return (record.last_token - record.first_token) / max(1, record.num_output_tokens - 1)


def summarize(records: Sequence[Record], objectives: Mapping[str, float] | None = None) -> dict[str, Any]:
    """One repeat of one point.

    Args:
        objectives: most milliseconds of ttft, tpot or e2el, for goodput.
    """
    good = [record for record in records if record.failure is None]
    ends = [record.end for record in records]
    duration = max(ends) - min(record.start for record in records) if records else 0.0
    num_input = sum(record.num_input_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)

    def rate(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "failures": dict(Counter(record.failure for record in records if record.failure)),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": rate(len(good)),
        "request_goodput": rate(sum(_keeps(record, objectives) for record in good)) if objectives else None,
        "output_throughput": rate(num_output),
        "total_token_throughput": rate(num_input + num_output),
        "max_output_tokens_per_s": _busiest_second(good),
        "max_concurrent_requests": _most_at_once(records),
        "short_outputs": sum(_is_short(record) for record in good),
        "counted_by_server": bool(good) and all(record.is_counted for record in good),
    }
    for name, seconds in latencies(records).items():
        summary |= _statistics(name, seconds * 1e3)
    return summary


def _statistics(name: str, values_ms: np.ndarray[Any, Any]) -> dict[str, float | None]:
    if not len(values_ms):
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))}
    return {
        f"mean_{name}_ms": float(values_ms.mean()),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(values_ms.std()),
        **{f"p{p}_{name}_ms": float(np.percentile(values_ms, p)) for p in PERCENTILES},
    }


def _is_short(record: Record) -> bool:
    return record.is_counted and record.num_output_tokens < record.num_asked_tokens


def _keeps(record: Record, objectives: Mapping[str, float]) -> bool:
    seconds = {
        "ttft": record.first_token - record.start,
        "tpot": tpot(record),
        "e2el": record.end - record.start,
    }
    return all(seconds[name] * 1e3 <= most for name, most in objectives.items())


def _most_at_once(records: Sequence[Record]) -> int:
    changes = sorted([(record.start, 1) for record in records] + [(record.end, -1) for record in records])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def _busiest_second(records: Sequence[Record]) -> float:
    times = [record.first_token + np.cumsum([0.0, *record.gaps]) for record in records if record.first_token]
    if not times:
        return 0.0
    every = np.concatenate(times)
    return float(np.bincount((every - every.min()).astype(int)).max())


def combine(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The point: each number's median over the repeats, and its `spread`. What went wrong is added up."""
    point: dict[str, Any] = {}
    spread: dict[str, tuple[float, float]] = {}
    for name, first in repeats[0].items():
        values = [repeat[name] for repeat in repeats if repeat.get(name) is not None]
        if name == "repeat":
            pass  # its number
        elif name == "server":
            point[name] = _combine_server([repeat[name] for repeat in repeats])
        elif isinstance(first, bool):
            point[name] = all(values)
        elif name in ("failed", "short_outputs"):
            point[name] = sum(values)
        elif name == "faults":
            point[name] = [fault for value in values for fault in value]
        elif isinstance(first, dict):
            point[name] = dict(sum((Counter(value) for value in values), Counter()))
        elif values and isinstance(values[0], int | float):
            middle = float(np.median(values))
            point[name] = round(middle) if all(isinstance(value, int) for value in values) else middle
            spread[name] = (min(values), max(values))
        else:
            point[name] = values[0] if values else None
    return point | {"spread": spread, "num_repeats": len(repeats)}


def _combine_server(repeats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Peaks are the highest, counts are added up."""
    combined: dict[str, float] = {}
    for found in repeats:
        for name, value in found.items():
            before = combined.get(name, 0.0)
            combined[name] = max(before, value) if name.startswith("peak_") else before + value
    if queries := combined.get("prefix_cache_query_tokens"):
        combined["prefix_cache_hit_rate"] = combined.get("prefix_cache_hit_tokens", 0.0) / queries
    return combined
