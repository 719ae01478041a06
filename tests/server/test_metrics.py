"""The metrics as Prometheus reads them."""

import json
import re
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from nybble.core.messages import Stepped
from nybble.core.outputs import SequenceDelta, Timing
from nybble.core.stats import EngineStats
from nybble.server.metrics import Metrics

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_kv_blocks_used=5,
    num_kv_blocks=20,
    num_steps=7,
    num_preemptions=1,
    num_prompt_tokens=100,
    num_generated_tokens=40,
    num_prefix_query_tokens=90,
    num_prefix_hit_tokens=30,
)


def read(metrics: Metrics) -> dict[str, float]:
    """Sample name, with the labels besides the model's → value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "le")}
            assert sample.labels.get("model_name") == (None if sample.name == "process_resident_memory_bytes" else "m")
            if "le" not in sample.labels:
                found[":".join([sample.name.removeprefix("nybble:"), *labels.values()])] = sample.value
    return found


def test_gauges_and_totals_are_the_engines() -> None:
    found = read(Metrics("m", lambda: STATS))
    assert found["num_requests_running"] == 3
    assert found["num_requests_waiting"] == 2
    assert found["kv_cache_usage_perc"] == 0.25
    assert 1e7 < found["process_resident_memory_bytes"] < 1e11
    assert found["prompt_tokens_total"] == 100
    assert found["generation_tokens_total"] == 40
    assert found["num_preemptions_total"] == 1
    assert found["prefix_cache_hits_total"] / found["prefix_cache_queries_total"] == pytest.approx(1 / 3)
    assert found["request_success_total:stop"] == found["request_success_total:abort"] == 0


def test_durations_follow_from_the_steps() -> None:
    metrics = Metrics("m", lambda: STATS)
    metrics.submitted(12)
    begin = time.monotonic()
    timing = Timing(
        arrival_time=begin, first_scheduled_time=begin + 0.2, first_token_time=begin + 0.5, finished_time=begin + 2
    )
    first = SequenceDelta(request_id="a", index=0, token_ids=[1], timing=replace(timing, finished_time=None))
    more = SequenceDelta(request_id="a", index=0, token_ids=[2, 3])
    last = SequenceDelta(request_id="a", index=0, token_ids=[4], finish_reason="stop", timing=timing)
    metrics.stepped(Stepped(STATS, [first], 0.01))
    found = read(metrics)
    assert found["time_to_first_token_seconds_count"] == 1, "known while it goes on"
    assert found["e2e_request_latency_seconds_count"] == 0
    for delta in (more, last):
        metrics.stepped(Stepped(STATS, [delta], 0.01))
    metrics.stepped(Stepped(STATS, [SequenceDelta(request_id="b", index=0, finish_reason="abort")], 0.03))
    found = read(metrics)
    assert found["request_queue_time_seconds_sum"] == pytest.approx(0.2)
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(0.5)
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(2)
    assert found["request_prefill_time_seconds_sum"] == pytest.approx(0.3)
    assert found["request_decode_time_seconds_sum"] == pytest.approx(1.5)
    assert found["request_inference_time_seconds_sum"] == pytest.approx(1.8)
    assert found["inter_token_latency_seconds_count"] == 3  # as many as tokens after the first
    assert found["request_generation_tokens_sum"] == 4
    assert found["request_prompt_tokens_sum"] == 12
    assert found["engine_step_seconds_count"] == 4
    assert found["engine_step_seconds_sum"] == pytest.approx(0.06)
    assert found["request_success_total:stop"] == found["request_success_total:abort"] == 1
    assert not metrics._last_token_time
    assert not metrics._num_tokens, "nothing stays of what ended"


def test_an_engine_that_dies_leaves_nothing() -> None:
    metrics = Metrics("m", lambda: STATS)
    metrics.stepped(Stepped(STATS, [SequenceDelta(request_id="a", index=i, token_ids=[1]) for i in range(2)], 0.01))
    metrics.engine_died()
    assert read(metrics)["request_success_total:error"] == 2
    assert not metrics._last_token_time
    assert not metrics._num_tokens


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = (Path(__file__).parents[2] / "examples" / "grafana-dashboard.json").read_text()
    panels = json.loads(dashboard)["panels"]
    wanted = {name for panel in panels for t in panel["targets"] for name in re.findall(r"nybble:(\w+)", t["expr"])}
    text = Metrics("m", lambda: STATS).render().decode()
    there = set(re.findall(r"^nybble:(\w+)", text, re.MULTILINE))
    assert len(wanted) > 12
    assert wanted <= there
