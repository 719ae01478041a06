"""When requests of an open loop are due: Poisson, gamma or even arrivals, at one rate or a ramp of rates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice


def arrival_times(
    rate: float, num_requests: int, *, burstiness: float = 1.0, end_rate: float | None = None, seed: int = 0
) -> list[float]:
    """Seconds after the start at which each request is due; the first one at 0.

    Gaps are gamma-distributed with mean 1/rate and shape `burstiness`: 1 is a Poisson process, more is more even
    (infinity: all gaps are the same), less comes in bursts; the coefficient of variation is 1/√burstiness.

    Args:
        rate: requests a second; infinity: all at once.
        end_rate: the rate changes linearly with the number of requests sent, from `rate` to this.
    """
    draw = random.Random(f"arrivals {seed}")

    def gaps() -> Iterator[float]:
        for index in range(num_requests):
            share = index / max(1, num_requests - 1)
            now = rate if end_rate is None else rate + (end_rate - rate) * share
            if now == float("inf"):
                yield 0.0
            elif burstiness == float("inf"):
                yield 1 / now
            else:
                yield draw.gammavariate(burstiness, 1 / (now * burstiness))

    times, time = [], 0.0
    for gap in islice(gaps(), num_requests):
        times.append(time)
        time += gap
    return times
