"""`Point`: one load of a run, a number of streams or a rate."""

from __future__ import annotations

import msgspec

from nybble.bench.arrivals import arrival_times


class Point(msgspec.Struct, kw_only=True, frozen=True):
    """`concurrency`: streams of a closed loop, or the most at once of an open one. `request_rate`: requests a second of
    an open loop, rising or falling to `end_rate`; infinity sends all at once. `is_trace`: as the dataset's times say,
    `trace_speed` times as fast."""

    num_prompts: int
    concurrency: int | None = None
    request_rate: float | None = None
    end_rate: float | None = None
    burstiness: float = 1.0
    is_trace: bool = False
    trace_speed: float = 1.0

    @property
    def label(self) -> str:
        """What a table shows."""
        if self.is_trace:
            text = f"trace ×{self.trace_speed:g}"
        elif self.request_rate is None:
            return f"{self.concurrency} stream{'s' if self.concurrency != 1 else ''}"
        else:
            text = f"{self.request_rate:g}" + (f"→{self.end_rate:g}" if self.end_rate is not None else "") + " req/s"
        return text if self.concurrency is None else f"{text}, at most {self.concurrency}"

    def dues(self, seed: int, trace: list[float] | None) -> list[float] | None:
        """Seconds after the start for each request; None for a closed loop."""
        if self.is_trace:
            assert trace is not None
            return [due / self.trace_speed for due in trace[: self.num_prompts]]
        if self.request_rate is None:
            return None
        return arrival_times(
            self.request_rate, self.num_prompts, burstiness=self.burstiness, end_rate=self.end_rate, seed=seed
        )
