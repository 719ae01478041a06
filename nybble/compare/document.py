"""What a comparison found, as one document: the study's table, ratios, crossings and verdicts. Reports only show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nybble.bench.environment import environment
from nybble.bench.metrics import FORMULAS
from nybble.bench.points import Point
from nybble.bench.results import SCHEMA, to_json
from nybble.compare.comparison import SAMPLING, Asked, Comparison, rows_by_label
from nybble.compare.memory_sweep import Cell
from nybble.compare.verdict import THRESHOLDS, Ratio, crossing_words, inverse, ratios, speed_words

SHOWN = (
    "output_throughput",
    "request_throughput",
    "request_goodput",
    "completed",
    "failed",
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for kind in ("median", "p90", "p99")),
)
Rows = Mapping[str, Mapping[str, Any]]


def make_document(
    asked: Asked, comparison: Comparison, cells: Sequence[Cell], warnings: Sequence[str]
) -> dict[str, Any]:
    """Everything that the reports show."""
    is_paired = asked.order == "interleaved"
    rows = {name: rows_by_label(results) for name, results in comparison.results.items()}
    base = rows[asked.baseline]
    others = {name: own for name, own in rows.items() if name != asked.baseline}
    found = {name: ratios(own, base, "output_throughput", is_paired=is_paired) for name, own in others.items()}
    document = {
        "schema": SCHEMA,
        "benchmark": "compare",
        "complete": not comparison.failures,
        "environment": environment(),
        "settings": msgspec.structs.replace(asked, api_key="***" if asked.api_key else None),
        "sampling": {**SAMPLING, **asked.body, "ignore_eos": True},
        "baseline": asked.baseline,
        "targets": {name: {**comparison.facts[name], "results": list(own.values())} for name, own in rows.items()},
        "table": [_line(point, rows, found) for point in asked.points],
        "verdicts": _verdicts(asked, rows, found),
        "lengths": _length_words(rows),
        "peak_memory": [text for name, own in rows.items() for text in _memory_words(name, own)],
        "prefix_cache": [_cache_words(name, facts, rows[name]) for name, facts in comparison.facts.items()],
        "quality": comparison.quality(),
        "memory": list(cells),
        "failures": comparison.failures,
        "warnings": list(warnings),
        "formulas": FORMULAS,
    }
    return dict(to_json(document))


def _line(point: Point, rows: Mapping[str, Rows], found: Mapping[str, Mapping[str, Ratio]]) -> dict[str, Any]:
    """One load: each target's figures, and its ratio of output throughput to the baseline's."""
    cells = {}
    for name, own in rows.items():
        row = own.get(point.label)
        if row is None:
            continue
        ratio = found.get(name, {}).get(point.label)
        cells[name] = {
            **{field: row.get(field) for field in SHOWN},
            "spread": row["spread"].get("output_throughput"),
            "ratio": None if ratio is None else ratio._asdict(),
        }
    return {"label": point.label, "load": _load(point), "targets": cells}


def _load(point: Point) -> float:
    return float(point.request_rate if point.request_rate is not None else point.concurrency or 1)


def _verdicts(asked: Asked, rows: Mapping[str, Rows], found: Mapping[str, Mapping[str, Ratio]]) -> list[dict[str, str]]:
    """Sentences: one stream, the largest batch, where thresholds are crossed."""
    points = sorted(asked.points, key=_load)
    unit = "req/s" if points[0].request_rate is not None else "streams"
    verdicts = []
    for name, own in found.items():
        sound = [point for point in points if point.label in own and not _failed(rows, name, asked.baseline, point)]
        if not sound:
            verdicts.append(
                {"kind": "none", "target": name, "text": f"{name}: no load was served by both without failures"}
            )
            continue
        first, last = sound[0], sound[-1]
        kind = "single request" if first.concurrency == 1 and first.request_rate is None else "lightest load"
        told = [(kind, first), *([("batch", last)] if last is not first else [])]
        for what, point in told:
            words = speed_words(name, asked.baseline, own[point.label])
            verdicts.append({"kind": what, "target": name, "text": f"{point.label}: {words}"})
        if len(sound) > 1:
            loads = [_load(point) for point in sound]
            mine = [own[point.label] for point in sound]
            pair = f"{name} to {asked.baseline}"
            if max(ratio.value for ratio in mine) < 1 / min(ratio.value for ratio in mine):  # seen from the faster one
                mine, pair = [inverse(ratio) for ratio in mine], f"{asked.baseline} to {name}"
            for threshold in THRESHOLDS:
                text = f"{pair}: {crossing_words(loads, mine, threshold, unit)}"
                verdicts.append({"kind": f"ratio {threshold}", "target": name, "text": text})
    return verdicts


def _failed(rows: Mapping[str, Rows], name: str, baseline: str, point: Point) -> bool:
    return any(
        rows[each][point.label]["failed"] or rows[each][point.label]["short_outputs"] for each in (name, baseline)
    )


def _length_words(rows: Mapping[str, Rows]) -> str:
    """Whether all gave as many tokens as asked, by their own count."""
    every = [row for own in rows.values() for row in own.values()]
    if not every:
        return "nothing was measured"
    if not all(row["counted_by_server"] for row in every):
        return "not verified: a target sends no usage, so that events were counted"
    short = sum(row["short_outputs"] for row in every)
    inputs = {
        label: {own[label]["total_input_tokens"] for own in rows.values() if label in own}
        for label in next(iter(rows.values()))
    }
    differ = any(len(counts) > 1 for counts in inputs.values())
    words = f"{short} answers were shorter than asked" if short else "verified: each answer had the tokens asked for"
    return words + ("; the targets count the same prompts as different numbers of tokens" if differ else "")


def _memory_words(name: str, own: Rows) -> list[str]:
    """The most that its /metrics and the GPUs' driver told, where they did."""
    parts = []
    for field, text, divisor in (
        ("peak_resident_bytes", "{:,.0f} MB resident", 1e6),
        ("peak_gpu_memory_mib", "{:,.0f} MiB in use on the GPUs", 1),
    ):
        seen = [row["server"][field] for row in own.values() if field in row["server"]]
        if seen:
            parts.append(text.format(max(seen) / divisor))
    return [f"{name}: up to {', '.join(parts)}"] if parts else []


def _cache_words(name: str, facts: Mapping[str, Any], own: Rows) -> str:
    hits = [row["server"]["prefix_cache_hit_rate"] for row in own.values() if "prefix_cache_hit_rate" in row["server"]]
    seen = f", {max(hits):.1%} of the prompts' tokens were found in it at most" if hits else ""
    return f"{name}: {facts.get('prefix_cache', 'not known')}{seen}"
