"""Formulas, on requests made by hand."""

import pytest

from nybble.bench.metrics import combine, summarize
from nybble.bench.record import Record


def record(start: float, first: float, gaps: list[float], **more: object) -> Record:
    last = first + sum(gaps)
    fields = {"num_input_tokens": 10, "num_output_tokens": len(gaps) + 1, "num_asked_tokens": len(gaps) + 1}
    fields |= {"is_counted": True, "end": last + 0.5}
    return Record(index=0, start=start, first_token=first, last_token=last, gaps=gaps, **(fields | more))  # type: ignore[arg-type]


def test_each_number() -> None:
    records = [
        record(0.0, 1.0, [0.1, 0.3]),
        record(1.0, 1.5, [0.2] * 4),
        record(2.0, 2.5, [], end=3.5),
        Record(index=3, start=0.5, end=4.0, failure="http", detail="500"),
    ]
    found = summarize(records, {"ttft": 600.0, "e2el": 1900.0})
    assert found["duration"] == pytest.approx(4.0)
    assert (found["completed"], found["failed"], found["failures"]) == (3, 1, {"http": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["request_throughput"] == pytest.approx(3 / 4)
    assert found["output_throughput"] == pytest.approx(9 / 4)
    assert found["total_token_throughput"] == pytest.approx(39 / 4)
    assert found["request_goodput"] == pytest.approx(2 / 4)  # the first took 1 s to its first token
    assert found["mean_ttft_ms"] == pytest.approx(1000 * (1.0 + 0.5 + 0.5) / 3)
    assert found["median_ttft_ms"] == pytest.approx(500)
    assert found["mean_tpot_ms"] == pytest.approx(200)  # of the two that have more than one token
    assert found["median_itl_ms"] == pytest.approx(200)
    assert found["mean_itl_ms"] == pytest.approx(200)
    assert found["p99_itl_ms"] == pytest.approx(295)  # linear between the last two of six
    assert found["mean_e2el_ms"] == pytest.approx(1000 * (1.9 + 1.8 + 1.5) / 3)
    assert found["max_concurrent_requests"] == 3
    assert found["short_outputs"] == 0
    assert found["counted_by_server"]


def test_short_answers_are_counted() -> None:
    found = summarize([record(0.0, 1.0, [0.1], num_asked_tokens=9), record(0.0, 1.0, [0.1])])
    assert found["short_outputs"] == 1


def test_nothing_succeeded() -> None:
    found = summarize([Record(index=0, start=1.0, end=1.0, failure="connect")])
    assert found["mean_ttft_ms"] is None
    assert found["output_throughput"] == 0.0
    assert summarize([])["duration"] == 0.0


def test_a_point_is_the_median_of_its_repeats() -> None:
    repeats = [
        {"x": value, "completed": 5, "failed": 1, "failures": {"http": 1}, "server": {"peak_a": value, "n": 2.0}}
        for value in (1.0, 9.0, 2.0)
    ]
    point = combine(repeats)
    assert (point["x"], point["spread"]["x"]) == (2.0, (1.0, 9.0))
    assert (point["completed"], point["failed"], point["failures"]) == (5, 3, {"http": 3})
    assert point["server"] == {"peak_a": 9.0, "n": 6.0}
    assert point["num_repeats"] == 3
