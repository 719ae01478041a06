"""Ratios between targets, with their uncertainty, and what they mean in words. Works on rows of results files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

THRESHOLDS = (1.1, 1.6)
# Two-sided 95 % of Student's t, by degrees of freedom from 1 on.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


class Ratio(NamedTuple):
    """How many times a figure is the baseline's; `low` and `high` hold it with 95 % confidence (None: one repeat)."""

    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        span = "" if self.low is None or self.high is None else f" ({self.low:.2f}–{self.high:.2f})"
        return f"{self.value:.2f}{span}"


def ratio_of(ours: Sequence[float], baseline: Sequence[float], *, is_paired: bool) -> Ratio | None:
    """The ratio of the geometric means of repeats.

    Args:
        is_paired: repeat i of both ran one after the other, so that what they share cancels.
    """
    pairs = min(len(ours), len(baseline))
    if not pairs or min([*ours, *baseline]) <= 0:
        return None
    logs, base_logs = np.log(ours), np.log(baseline)
    if is_paired:
        differences = logs[:pairs] - base_logs[:pairs]
        middle = float(differences.mean())
        error = float(differences.std(ddof=1)) / math.sqrt(pairs) if pairs > 1 else None
        freedom = pairs - 1
    else:
        middle = float(logs.mean() - base_logs.mean())
        variances = [float(each.var(ddof=1)) / len(each) if len(each) > 1 else None for each in (logs, base_logs)]
        error, freedom = _welch(variances, len(logs), len(base_logs))
    if error is None:
        return Ratio(math.exp(middle), None, None)
    margin = error * (_T[freedom - 1] if freedom <= len(_T) else 2.0)
    return Ratio(math.exp(middle), math.exp(middle - margin), math.exp(middle + margin))


def _welch(variances: Sequence[float | None], *counts: int) -> tuple[float | None, int]:
    if None in variances:
        return None, 0
    first, second = (variance or 0.0 for variance in variances)
    total = first + second
    below = first**2 / (counts[0] - 1) + second**2 / (counts[1] - 1)
    return math.sqrt(total), max(1, int(total**2 / below)) if below else min(counts) - 1


def figures(row: Mapping[str, Any], name: str) -> list[float]:
    """A figure of each repeat that has one."""
    return [repeat[name] for repeat in row["repeats"] if repeat.get(name)]


def ratios(
    rows: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]], name: str, *, is_paired: bool
) -> dict[str, Ratio]:
    """By label, where both have the point."""
    found = {}
    for label, row in rows.items():
        if label in baseline:
            ratio = ratio_of(figures(row, name), figures(baseline[label], name), is_paired=is_paired)
            if ratio is not None:
                found[label] = ratio
    return found


def crossings(loads: Sequence[float], values: Sequence[float], threshold: float) -> list[float]:
    """Where the ratio passes a threshold, between points on a logarithmic scale of the load."""
    found = []
    for (load, value), (next_load, next_value) in zip(
        zip(loads, values, strict=True), list(zip(loads, values, strict=True))[1:], strict=False
    ):
        if (value - threshold) * (next_value - threshold) < 0:
            share = (threshold - value) / (next_value - value)
            found.append(math.exp(math.log(load) + share * (math.log(next_load) - math.log(load))))
    return found


def crossing_words(loads: Sequence[float], found: Sequence[Ratio], threshold: float, unit: str) -> str:
    """A sentence about a threshold."""
    values = [ratio.value for ratio in found]
    passes = crossings(loads, values, threshold)
    if passes:
        where = ", ".join(f"{load:.3g}" for load in passes)
        words = f"the ratio crosses {threshold} at about {where} {unit}"
    elif min(values) >= threshold:
        words = f"the ratio is above {threshold} at every load"
    else:
        words = f"the ratio stays below {threshold} at every load"
    unsure = [ratio for ratio in found if ratio.low is not None and ratio.low < threshold < (ratio.high or 0)]
    return words + (f" ({len(unsure)} of {len(found)} points may lie on either side)" if unsure else "")


def inverse(ratio: Ratio) -> Ratio:
    """The ratio the other way round."""
    return Ratio(1 / ratio.value, ratio.high and 1 / ratio.high, ratio.low and 1 / ratio.low)


def speed_words(name: str, other: str, ratio: Ratio | None) -> str:
    """Which of two is faster, and whether that is shown. `ratio`: of speeds, more is faster."""
    if ratio is None:
        return f"{name} and {other} cannot be compared: one has no figure"
    low, high = ratio.low, ratio.high
    if low is None or high is None:
        return f"{name} has {ratio.value:.2f} times {other}'s speed (one repeat: uncertainty not known)"
    span = f"95 %: {low:.2f} to {high:.2f}"
    if low <= 1 <= high:
        return f"no difference is shown between {name} and {other} ({ratio.value:.2f} times; {span})"
    if ratio.value > 1:
        return f"{name} is {ratio.value:.2f} times as fast as {other} ({span})"
    return f"{name} is slower: {ratio.value:.2f} times {other}'s speed ({span})"
