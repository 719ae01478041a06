"""`nybble bench serve` as a command: its results, and what it says when things go wrong."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.timed_server import TimedServer

from nybble.bench.server_metrics import MetricsWatch
from nybble.cli import main
from nybble.commands.bench_tables import make_console, show_server_facts

pytestmark = pytest.mark.slow


def bench(capsys: pytest.CaptureFixture[str], url: str, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the last line's JSON ({} if nothing was printed), what was said on standard error."""
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "--base-url", url, "--input-len", "8", "--output-len", "6", *flags])
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    return end.value.code or 0, json.loads(lines[-1]) if lines else {}, said.err  # type: ignore[return-value]


def test_results_have_vllms_names_and_say_where_they_come_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, table = tmp_path / "r.json", tmp_path / "r.csv"
    with TimedServer(0.01, 0.002) as server:
        flags = ["--concurrency", "1,3", "--num-prompts", "6", "--repeats", "3", "--clients", "2"]
        flags += ["--goodput", "ttft:60000 tpot:0.0001", "--detailed", "--api-key", "hush", "--csv", str(table)]
        code, last, _ = bench(capsys, server.url, *flags, "-o", str(file))
    document = json.loads(file.read_text())
    assert (code, last["complete"], document["complete"]) == (0, True, True)
    assert "hush" not in file.read_text()
    assert document["environment"]["num_cores"] >= 1
    assert document["environment"]["command"][1:3] or document["environment"]["command"]
    one, three = document["results"]
    assert [row["max_concurrency"] for row in (one, three)] == [1, 3]
    for row in (one, three):
        assert len(row["repeats"]) == 3
        assert (row["completed"], row["failed"], row["total_output_tokens"]) == (6, 0, 36)
        assert row["total_input_tokens"] == 48
        for name in ("ttft", "tpot", "itl", "e2el"):
            least, most = row["spread"][f"median_{name}_ms"]
            assert 0 < least <= row[f"median_{name}_ms"] <= most
            assert row[f"median_{name}_ms"] <= row[f"p99_{name}_ms"]
        assert row["request_goodput"] == 0.0
        assert len(row["repeats"][0]["ttfts"]) == len(row["repeats"][0]["itls"]) == 6
    assert three["output_throughput"] > 1.5 * one["output_throughput"]
    assert last["results"][1]["output_throughput"] == three["output_throughput"]
    rows = list(csv.DictReader(table.open()))
    assert float(rows[1]["output_throughput"]) == three["output_throughput"]


def test_an_open_loop_keeps_its_rate_and_a_run_of_one_point_is_flat(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    with TimedServer(0.05, 0.001) as server:
        flags = ["--request-rate", "50", "--burstiness", "inf", "--num-prompts", "25", "--repeats", "1"]
        code, _, _ = bench(capsys, server.url, *flags, "-o", str(file))
        came = [request["came"] for request in server.truth(25)]
    assert code == 0
    assert (max(came) - min(came)) / 24 == pytest.approx(0.02, rel=0.1)
    document = json.loads(file.read_text())
    assert document["request_rate"] == 50
    assert document["mean_ttft_ms"] == document["results"][0]["mean_ttft_ms"]


def test_a_sweep_ends_where_throughput_does(capsys: pytest.CaptureFixture[str]) -> None:
    with TimedServer(0.02, 0.0) as server:
        flags = ["--sweep", "--concurrency", "64", "--output-len", "1", "--num-prompts", "64", "--repeats", "1"]
        code, last, said = bench(capsys, server.url, *flags)
    rates = [row["output_throughput"] for row in last["results"]]
    assert code == 0, said
    assert len(rates) >= 2
    assert rates[-1] < 1.05 * rates[-2] or len(rates) == 2


def test_turns_carry_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    with TimedServer() as server:
        flags = ["--turns", "3", "--route", "chat", "--num-prompts", "2", "--repeats", "1", "--warmups", "0"]
        code, last, _ = bench(capsys, server.url, *flags)
        asked = [request["body"]["messages"] for request in server.truth(6)]
    assert code == 0
    assert last["results"][0]["completed"] == 6
    assert [len(messages) for messages in asked] == [1, 3, 5] * 2
    assert asked[2][:2] == asked[1][:2]
    assert asked[1][1] == {"role": "assistant", "content": " tok" * 6}


FAILURES = {
    "malformed": "no stream of OpenAI events.*broken",
    "empty": "an answer without a token",
    "short": "ignores ignore_eos.*finish_reason stop",
    "refuses": "the server refused the request.*400: too long",
    "error": "reported an error in the stream.*engine died",
    "cut": "the connection ended before the answer did",
    "html": "no stream of OpenAI events.*<html>",
    "hangs": "no answer in time",
    "dies": r"takes no more connections; \d+ requests were not sent",  # those under way are lost or refused
}


@pytest.mark.parametrize("fault", FAILURES)
def test_failures_are_told_by_kind_and_what_was_measured_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str
) -> None:
    file = tmp_path / "r.json"
    with TimedServer(0.001, 0.001, fault=fault, after=12) as server:
        flags = ["--num-prompts", "8", "--repeats", "2", "--concurrency", "2", "--warmups", "1", "--timeout", "1"]
        code, last, said = bench(capsys, server.url, *flags, "-o", str(file))
    assert code == 1
    assert re.search(FAILURES[fault], said), said
    assert str(file) in said
    document = json.loads(file.read_text())
    assert document["complete"] is last["complete"] is False
    assert document["results"][0]["repeats"][0]["completed"] == 8  # the first repeat was sound
    assert document["results"][0]["repeats"][0]["failed"] == 0
    if fault != "short":
        assert sum(document["results"][0]["failures"].values()) > 0


def test_a_busy_client_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shared_server: TimedServer
) -> None:
    monkeypatch.setattr("nybble.bench.serve_run.BUSY_CLIENT", 0.0)
    code, _, said = bench(capsys, shared_server.url, "--num-prompts", "2", "--repeats", "2")
    assert code == 0
    assert len(re.findall("warning: .* the client may be what limits these figures; raise --clients", said)) == 1


def test_a_trace_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"timestamp": 200 * i, "input_length": 5 + i, "output_length": 2 + i} for i in range(4)]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with TimedServer() as server:
        command = ["bench", "serve", "--base-url", server.url, "--dataset", str(file), "--trace-speed", "2"]
        with pytest.raises(SystemExit):
            main([*command, "--repeats", "1", "--warmups", "0"])
        requests = server.truth(4)
    assert [request["body"]["max_tokens"] for request in requests] == [2, 3, 4, 5]
    assert [len(request["body"]["prompt"].split()) for request in requests] == [5, 6, 7, 8]
    assert requests[3]["came"] - requests[0]["came"] == pytest.approx(0.3, abs=0.05)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]["total_output_tokens"] == 14


def test_without_usage_events_are_counted_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with TimedServer(fault="no_usage", after=0) as server:
        code, last, said = bench(capsys, server.url, "--num-prompts", "2", "--repeats", "1")
    assert code == 0
    assert last["results"][0]["total_output_tokens"] == 12
    assert "sends no usage" in said


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-url", f"http://127.0.0.1:{free_port()}"], "no server answers at"),
        (["--base-url", "ftp://x"], "must look like http://"),
        (["--model", "other"], "serves timed, not other"),
        (["--concurrency", "0"], "at least 1"),
        (["--concurrency", "x"], "whole numbers"),
        (["--request-rate", "-2"], "above 0"),
        (["--request-rate", "2", "--concurrency", "2"], "give one"),
        (["--max-concurrency", "2"], "go with --request-rate"),
        (["--input-len", "9-3"], "from the smaller to the larger"),
        (["--goodput", "speed:3"], "--goodput speed:3"),
        (["--extra-body", "[1]"], "must be a JSON object"),
        (["--output", "/nowhere/r.json"], "no directory"),
        (["--resume"], "give its --output"),
        (["--dataset", "none.jsonl"], "none.jsonl"),
        (["--repeats", "0"], "--repeats"),
        (["--sweep", "--concurrency", "1,2"], "--sweep begins at one"),
    ],
)
def test_bad_flags(
    capsys: pytest.CaptureFixture[str], shared_server: TimedServer, flags: list[str], message: str
) -> None:
    code, _, said = bench(capsys, shared_server.url, *flags)
    assert code == 2
    assert message in said
    assert said.startswith("error: ")
    assert len(said.strip().splitlines()) == 1


def test_what_failed_is_measured_again_and_no_resumed_run_calls_it_complete(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    with TimedServer(0.001, 0.001, fault="short", after=12) as server:
        flags = ["--num-prompts", "8", "--repeats", "2", "--concurrency", "2", "--warmups", "1", "-o", str(file)]
        assert bench(capsys, server.url, *flags)[0] == 1
        sound, faulty = json.loads(file.read_text())["results"][0]["repeats"]
        assert (sound["faults"], len(faulty["faults"])) == ([], 1)
        code, last, said = bench(capsys, server.url, *flags, "--resume")
    assert (code, last["complete"]) == (1, False)
    assert f"1 repeats of {file} had faults and are measured again" in said
    repeats = json.loads(file.read_text())["results"][0]["repeats"]
    assert repeats[0] == sound
    assert [repeat["repeat"] for repeat in repeats] == [0, 2]
    assert repeats[1]["short_outputs"] == 8  # it was asked anew, and all answers were short this time


def test_a_run_too_short_for_a_look_at_the_server_tells_no_peaks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"label": "x", "server": {"preemptions": 0.0, "peak_resident_bytes": 2e9}}]
    show_server_facts(rows, make_console())
    assert capsys.readouterr().out == "x: server: 2,000 MB resident, 0 preemptions\n"


@pytest.fixture(scope="module")
def shared_server():
    with TimedServer() as server:
        yield server


def test_an_interrupted_run_is_kept_and_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    with TimedServer(0.2) as server:
        flags = ["--num-prompts", "4", "--repeats", "3", "--output-len", "1", "--warmups", "0", "-o", str(file)]
        command = [sys.executable, "-m", "nybble", "bench", "serve", "--base-url", server.url, "--input-len", "8"]
        process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        deadline = time.monotonic() + 60
        while not (file.exists() and json.loads(file.read_text())["results"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        before = json.loads(file.read_text())["results"][0]["repeats"]
        assert 1 <= len(before) < 3
        code, _, said = bench(capsys, server.url, *flags, "--resume", "--input-len", "9")
        assert code == 2
        assert "other settings (workload)" in said
        code, _, _ = bench(capsys, server.url, *flags, "--resume")
    document = json.loads(file.read_text())
    assert (code, document["complete"]) == (0, True)
    assert document["results"][0]["repeats"][: len(before)] == before
    assert len(document["results"][0]["repeats"]) == 3


def test_prompts_that_the_server_remembers_from_an_earlier_run_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricsWatch, "found", {"prefix_cache_hit_rate": 0.5})
    with TimedServer() as server:
        flags = ["--num-prompts", "2", "--repeats", "1", "--warmups", "0"]
        assert "50% of the prompts' tokens in its prefix cache" in bench(capsys, server.url, *flags)[2]
        assert "prefix cache" not in bench(capsys, server.url, *flags, "--prefix-len", "4")[2]
