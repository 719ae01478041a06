"""`Metrics`: what Prometheus reads at /metrics, under vLLM's names with the prefix `nybble:`.

Gauges and totals are the engine's own, read when somebody asks; durations are observed as steps arrive. Times are
`time.monotonic()` seconds, one clock for all processes of a machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nybble.core import machine
from nybble.core.messages import Stepped
from nybble.core.outputs import SequenceDelta
from nybble.core.stats import EngineStats
from nybble.server.record import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCIES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_LATENCIES = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
REQUEST_LATENCIES = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """One registry.

    Args:
        model_name: label of every metric.
        stats: the engine's gauges and totals now.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, stats))
        self._last_token_time: dict[tuple[str, int], float] = {}
        self._num_tokens: dict[tuple[str, int], int] = {}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"nybble:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
            return family.labels(model_name)

        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", LATENCIES)
        self._inter_token = histogram("inter_token_latency_seconds", "Between two tokens.", TOKEN_LATENCIES)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduling.", REQUEST_LATENCIES)
        self._prefill = histogram("request_prefill_time_seconds", "First scheduling to first token.", REQUEST_LATENCIES)
        self._decode = histogram("request_decode_time_seconds", "First token to last.", REQUEST_LATENCIES)
        self._inference = histogram(
            "request_inference_time_seconds", "First scheduling to last token.", REQUEST_LATENCIES
        )
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_LATENCIES)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", LENGTHS)
        self._generated = histogram("request_generation_tokens", "Tokens of a completion.", LENGTHS)
        self._step = histogram("engine_step_seconds", "The host's time for a step of the engine.", TOKEN_LATENCIES)
        self._answers = Counter(
            "nybble:http_responses",
            "Answers by status; 499 had no client left.",
            ["model_name", "status"],
            registry=self._registry,
        )
        ended = Counter(
            "nybble:request_success",
            "Completions that ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._ended = {
            reason: ended.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")
        }  # from 0 on, so that a rate can be taken

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)

    def submitted(self, num_prompt_tokens: int) -> None:
        self._prompt.observe(num_prompt_tokens)

    def answered(self, record: RequestRecord) -> None:
        """Take the end of an HTTP request."""
        self._answers.labels(self._model_name, str(record.status)).inc()

    def engine_died(self) -> None:
        """Nothing more comes of what is open; the `EngineClient`'s `on_death`."""
        self._ended["error"].inc(len(self._num_tokens))
        self._last_token_time.clear()
        self._num_tokens.clear()

    def stepped(self, step: Stepped) -> None:
        """Take a step's news; the `EngineClient`'s `on_step`."""
        self._step.observe(step.seconds)
        now = time.monotonic()
        for delta in step.deltas:
            key = (delta.request_id, delta.index)
            if delta.token_ids:
                last = self._last_token_time.get(key)
                if last is None:
                    self._begun(delta)
                else:
                    for _ in delta.token_ids:
                        self._inter_token.observe((now - last) / len(delta.token_ids))
                self._last_token_time[key] = now
                self._num_tokens[key] = self._num_tokens.get(key, 0) + len(delta.token_ids)
            if delta.finish_reason is not None and delta.refused_parameter is None:
                self._finished(key, delta)

    def _begun(self, delta: SequenceDelta) -> None:
        """Take a completion's first token: a slow one shows while it is slow, not when the completion has ended."""
        timing = delta.timing
        if timing is None or timing.first_token_time is None:
            return
        self._first_token.observe(timing.first_token_time - timing.arrival_time)
        if timing.first_scheduled_time is not None:
            self._queue.observe(timing.first_scheduled_time - timing.arrival_time)
            self._prefill.observe(timing.first_token_time - timing.first_scheduled_time)

    def _finished(self, key: tuple[str, int], delta: SequenceDelta) -> None:
        assert delta.finish_reason is not None
        self._last_token_time.pop(key, None)
        self._ended[delta.finish_reason].inc()
        self._generated.observe(self._num_tokens.pop(key, 0))
        timing = delta.timing
        if timing is None:
            return
        arrival, scheduled = timing.arrival_time, timing.first_scheduled_time
        first, last = timing.first_token_time, timing.finished_time
        for metric, begin, end in (
            (self._decode, first, last),
            (self._inference, scheduled, last),
            (self._whole, arrival, last),
        ):
            if begin is not None and end is not None:
                metric.observe(end - begin)


class _EngineCollector(Collector):
    """Reads `EngineStats` when Prometheus asks."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0
        for name, text, gauge in (
            ("num_requests_running", "Sequences in the batch.", stats.num_running),
            ("num_requests_waiting", "Sequences in the queue.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", usage),
        ):
            family = GaugeMetricFamily(f"nybble:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], gauge)
            yield family
        if (resident := machine.resident_bytes()) is not None:
            text = "Resident memory of the server and its engine."
            yield GaugeMetricFamily("process_resident_memory_bytes", text, resident)
        for name, text, total in (
            ("prompt_tokens", "Prompt tokens of accepted requests.", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("num_preemptions", "Sequences put back to give their blocks to others.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.num_prefix_hit_tokens),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
        ):
            counter = CounterMetricFamily(f"nybble:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], total)
            yield counter
