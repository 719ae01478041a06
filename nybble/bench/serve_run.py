"""`ServeRun`: the points of `nybble bench serve`, each warmed up and repeated, into a `ResultsFile`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from nybble.bench.clients import Clients
from nybble.bench.load import ShareResult
from nybble.bench.metrics import summarize
from nybble.bench.points import Point
from nybble.bench.record import FAILURES, Record
from nybble.bench.results import ResultsFile
from nybble.bench.server_metrics import MetricsWatch
from nybble.bench.target import TargetSettings
from nybble.bench.workload import WorkloadSettings

BUSY_CLIENT = 0.8
LATE_SECONDS = 0.01
WARM_CACHE = 0.02
MAX_WARMUPS = 64
LOCAL = ("127.0.0.1", "localhost", "::1")


class Plan(msgspec.Struct, kw_only=True, frozen=True):
    """How points are measured. `num_warmups`: requests before a point; None: as many as its streams, at most 64."""

    num_repeats: int = 3
    num_warmups: int | None = None
    num_clients: int = 1
    objectives: dict[str, float] = {}
    is_detailed: bool = False


class ServeRun:
    """Measures points on one server.

    Args:
        results: what is in it already is not measured again.
        trace: when a trace's requests are due, for points that replay it.
        warn: called with each thing that makes a figure doubtful.
        on_news: called with the part that runs, the conversations done and the tokens received in it.
    """

    def __init__(
        self,
        target: TargetSettings,
        workload: WorkloadSettings,
        plan: Plan,
        results: ResultsFile,
        *,
        trace: list[float] | None = None,
        warn: Callable[[str], None],
        on_news: Callable[[str, int, int], None] = lambda part, num_done, num_tokens: None,
    ) -> None:
        self._target = target
        self._workload = workload
        self._plan = plan
        self._results = results
        self._trace = trace
        self._warn = warn
        self._on_news = on_news
        self._clients: Clients | None = None
        self._warned: set[str] = set()
        self.failures: list[str] = []  # sentences
        self.has_died = False

    def measure(self, points: Iterable[Point]) -> Iterator[dict[str, Any]]:
        """Measure points one after another; gives each one's row. Ends early if the server dies."""
        try:
            for point in points:
                while self._results.num_repeats(point.label) < self._plan.num_repeats and not self.has_died:
                    self.measure_once(point)
                if self._results.num_repeats(point.label):
                    yield next(row for row in self._results.rows() if row["label"] == point.label)
                if self.has_died:
                    return
        finally:
            self.close()

    def close(self) -> None:
        """End the client processes."""
        if self._clients is not None:
            self._clients.close()
            self._clients = None

    def measure_once(self, point: Point) -> None:
        """Warm up and measure one repeat, into the results."""
        repeat = self._results.next_repeat(point.label)
        if self._clients is None:  # only now: a resumed run may have nothing left to do
            self._clients = Clients(self._plan.num_clients, self._target, self._workload)
        part = f"{point.label}, repeat {repeat + 1}"
        num_warmups = self._plan.num_warmups
        if num_warmups is None:
            num_warmups = min(point.concurrency or 8, point.num_prompts, MAX_WARMUPS)
        if num_warmups:
            self._clients.run(f"warm-up of {part}", num_warmups, num_warmups)
        is_local = urlsplit(self._target.base_url).hostname in LOCAL
        with MetricsWatch(self._target, is_local=is_local) as watch:
            shares = self._clients.run(
                part,
                point.num_prompts,
                point.concurrency or 0,
                point.dues(self._workload.seed + repeat, self._trace),
                on_news=lambda num_done, num_tokens: self._on_news(part, num_done, num_tokens),
            )
        records = sorted((record for share in shares for record in share.records), key=lambda record: record.start)
        self._on_news(part, point.num_prompts, sum(record.num_output_tokens for record in records))
        num_sent = len({record.index for record in records})
        summary = {
            **self._facts(point),
            **summarize(records, self._plan.objectives),
            "num_unsent": point.num_prompts - num_sent,
            **_client_facts(shares),
            "server": watch.found,
        }
        if self._plan.is_detailed:
            summary |= _details(records)
        summary["faults"] = self._faults(part, summary, records)
        self.failures += summary["faults"]
        self._warn_of_doubts(part, point, summary)
        self._results.add(point.label, msgspec.to_builtins(point), summary)

    def _facts(self, point: Point) -> dict[str, Any]:
        """Of the load, under vLLM's names."""
        return {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "backend": "openai" if self._target.route == "completions" else "openai-chat",
            "model_id": self._target.model,
            "tokenizer_id": self._workload.tokenizer,
            "num_prompts": point.num_prompts,
            "request_rate": point.request_rate if point.request_rate is not None else "inf",
            "burstiness": point.burstiness,
            "max_concurrency": point.concurrency,
        }

    def _faults(self, part: str, summary: Mapping[str, Any], records: list[Record]) -> list[str]:
        """What makes the figures not those that were asked for, in sentences."""
        faults = []
        for kind, count in summary["failures"].items():
            detail = next(record.detail for record in records if record.failure == kind)
            faults.append(f"{part}: {count} of {len(records)} requests failed: {FAILURES[kind]} ({detail})")
        if summary["num_unsent"] or summary["failures"].get("connect") == len(records):
            self.has_died = True
            unsent = f"; {summary['num_unsent']} requests were not sent" if summary["num_unsent"] else ""
            faults.append(f"{part}: {self._target.base_url} takes no more connections{unsent}")
        if summary["short_outputs"] and self._target.ignore_eos:
            reasons = sorted({str(record.finish_reason) for record in records if record.failure is None})
            faults.append(
                f"{part}: the server ignores ignore_eos: {summary['short_outputs']} of {summary['completed']} answers "
                f"were shorter than asked (finish_reason {', '.join(reasons)}), so speeds are not of the lengths given"
            )
        return faults

    def _warn_of_doubts(self, part: str, point: Point, summary: Mapping[str, Any]) -> None:
        if summary["client_cpu"] > BUSY_CLIENT:
            self._warn_once(
                "cpu",
                f"{part}: a client process used {summary['client_cpu']:.0%} of a core, so the client may be what "
                "limits these figures; raise --clients",
            )
        elif summary["client_lag_p99_ms"] > max(20.0, 0.05 * (summary["median_ttft_ms"] or 0.0)):
            self._warn_once(
                "lag",
                f"{part}: the client woke up to {summary['client_lag_p99_ms']:.0f} ms late (p99): this machine is "
                "busy, and short latencies are doubtful; run the client elsewhere, or raise --clients",
            )
        hits = summary["server"].get("prefix_cache_hit_rate", 0.0)
        if hits > WARM_CACHE and self._workload.is_all_new:
            self._warn_once(
                "cache",
                f"{part}: the server had {hits:.0%} of the prompts' tokens in its prefix cache, though none repeats "
                "here: an earlier run sent them; give another --seed, or restart the server",
            )
        if point.request_rate is not None and summary["late_p99_ms"] > LATE_SECONDS * 1e3:
            self._warn_once(
                "late", f"{part}: requests were sent up to {summary['late_p99_ms']:.0f} ms (p99) after they were due"
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(message)


def _client_facts(shares: list[ShareResult]) -> dict[str, float]:
    late = sorted(record.late for share in shares for record in share.records)
    return {
        "client_cpu": max(share.cpu_share for share in shares),
        "client_lag_p99_ms": max(share.lag_p99 for share in shares) * 1e3,
        "late_p99_ms": late[len(late) * 99 // 100] * 1e3 if late else 0.0,
    }


def _details(records: list[Record]) -> dict[str, Any]:
    """A value a request, as vLLM's --save-detailed; seconds."""
    return {
        "input_lens": [record.num_input_tokens for record in records],
        "output_lens": [record.num_output_tokens for record in records],
        "start_times": [record.start - records[0].start for record in records],
        "ttfts": [record.first_token - record.start if record.first_token else 0.0 for record in records],
        "itls": [record.gaps for record in records],
        "e2els": [record.end - record.start for record in records],
        "errors": [f"{record.failure}: {record.detail}" if record.failure else "" for record in records],
    }
