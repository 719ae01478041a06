"""`nybble compare` as a command, on servers of known timing and on two `tiny` engines; its page in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.timed_server import TimedServer

from nybble.cli import main

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")


def compare(capsys: pytest.CaptureFixture[str], out: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, results.json ({} if there is none), what was said on standard error."""
    with pytest.raises(SystemExit) as end:
        main(["compare", "--out", str(out), "--input-len", "8", "--output-len", "8", *flags])
    said = capsys.readouterr()
    file = out / "results.json"
    document = json.loads(file.read_text()) if file.exists() else {}
    if document:
        assert json.loads(said.out.strip().splitlines()[-1])["benchmark"] == "compare"
    return end.value.code or 0, document, said.err  # type: ignore[return-value]


def test_a_known_ratio_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with TimedServer(0.02, 0.01) as fast, TimedServer(0.04, 0.02) as slow:
        flags = ["--target", f"fast={fast.url}", "--target", f"slow={slow.url}", "--concurrency", "1,4"]
        code, document, _ = compare(capsys, tmp_path, *flags, "--num-prompts", "4", "--warmups", "0")
        prompts = [[request["body"]["prompt"] for request in server.truth()] for server in (fast, slow)]
        body = fast.truth()[-1]["body"]
    assert code == 0
    for line in document["table"]:
        ratio = line["targets"]["slow"]["ratio"]
        assert ratio["value"] == pytest.approx(0.5, rel=0.1)
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
    said = {verdict["kind"]: verdict["text"] for verdict in document["verdicts"]}
    assert "slow is slower" in said["single request"]
    assert "fast to slow: the ratio is above 1.6 at every load" in said["ratio 1.6"]
    assert sorted(prompts[0][-24:]) == sorted(prompts[1][-24:])  # the same work for both …
    assert len(set(prompts[0][-24:])) == 24  # … and no prompt twice
    assert (body["temperature"], body["repetition_penalty"], body["ignore_eos"]) == (0.0, 1.0, True)
    assert document["lengths"].startswith("verified")
    assert "no usable answer" in document["quality"]["slow"] or "no log-probabilities" in document["quality"]["slow"]


TINY_FLAGS = "--kv-cache-memory-bytes 8000000"


def test_two_tiny_engines_and_the_page_in_chromium(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    flags = ["--model", "tiny", "--target", f"wide=nybble {TINY_FLAGS}", "--target", "narrow=nybble --max-num-seqs 1"]
    flags += ["--concurrency", "1,6", "--num-prompts", "12", "--output-len", "24", "--memory-batches", "2"]
    code, document, said = compare(
        capsys, tmp_path, *flags, "--memory-sweep", "0.002,1.5", "--memory-flag=--cache-max-entry-count"
    )
    assert code == 0, said
    last = document["table"][-1]["targets"]
    assert last["narrow"]["median_ttft_ms"] > 1.5 * last["wide"]["median_ttft_ms"]  # requests wait for the one place
    assert 0 < last["narrow"]["ratio"]["low"] < last["narrow"]["ratio"]["high"]
    assert document["quality"]["narrow"]["is_passed"]
    assert document["targets"]["wide"]["prefix_cache"] == "off"
    assert {cell["target"] for cell in document["memory"]} == {"wide", "narrow"}
    states = {(cell["target"], cell["value"]): cell for cell in document["memory"]}
    assert states["narrow", 0.002]["state"] == "served"
    assert states["narrow", 0.002]["output_throughput"] > 0
    assert states["narrow", 1.5]["state"] == "no start"
    assert "cache_max_entry_count" in states["narrow", 1.5]["detail"]
    page = tmp_path / "report.html"
    assert page.stat().st_size < 2_000_000
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page.read_text().split("<script", 1)[0])
    for name in ("throughput", "latency", "pareto", "ratio", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "report.md").read_text()
    assert "| 6 streams |" in markdown
    assert "nybble serve tiny" in markdown
    assert re.search(r"Memory of wide: up to \d+ MB resident", markdown)
    open_page(page)


def open_page(page: Path) -> None:
    """No console message, nothing loaded from elsewhere, every plot drawn, the choice of latencies works."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        tab = context.new_page()
        complaints: list[str] = []
        urls: list[str] = []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: urls.append(request.url))
        tab.goto(page.as_uri())
        for plot in ("throughput", "ratio", "latency", "pareto", "memory"):
            tab.locator(f"#{plot} .main-svg").first.wait_for()
        assert tab.locator("#throughput .scatterlayer .trace").count() == 2
        assert tab.locator("#memory .scatterlayer .point").count() == 4
        tab.get_by_role("button", name="end to end").click()
        assert "end to end, ms" in (tab.locator("#latency .ytitle").text_content() or "")
        assert complaints == []
        assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
        browser.close()


def test_what_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("command: ['{python}', '-c', 'raise SystemExit(\"error: no such card\")']\n")
    with TimedServer(0.001, 0.001, model="m") as sound, TimedServer(fault="short", after=2, model="m") as short:
        flags = ["--target", f"sound={sound.url}", "--target", f"short={short.url}", "--target", f"broken={broken}"]
        flags += ["--model", "m", "--num-prompts", "2", "--repeats", "2", "--warmups", "0", "--no-quality"]
        code, document, said = compare(capsys, tmp_path / "out", *flags)
    assert code == 1
    assert re.search("broken: it ended with exit code 1: error: no such card", said)
    assert re.search("short: 1 stream, repeat 1: the server ignores ignore_eos", said)
    assert document["complete"] is False
    assert document["table"][0]["targets"]["sound"]["completed"] == 2
    assert "shorter than asked" in document["lengths"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_report_is_written_even_if_nothing_started(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    none = tmp_path / "none.yaml"
    none.write_text("command: [no-such-program]\n")
    flags = ["--target", f"a={none}", "--target", f"b={none}", "--model", "m"]
    code, document, said = compare(capsys, tmp_path / "out", *flags)
    assert code == 1
    assert "a: no-such-program cannot be started" in said
    assert document["lengths"] == "nothing was measured"
    assert "cannot be started" in (tmp_path / "out" / "report.html").read_text()


def test_blocks_measure_one_target_after_the_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with TimedServer(model="m") as one, TimedServer(model="m") as other:
        flags = ["--target", f"a={one.url}", "--target", f"b={other.url}", "--order", "blocks", "--no-quality"]
        code, document, _ = compare(capsys, tmp_path, *flags, "--num-prompts", "2", "--warmups", "0")
        assert max(request["came"] for request in one.truth()) < min(request["came"] for request in other.truth())
    assert code == 0
    assert document["table"][0]["targets"]["b"]["ratio"]["low"] is not None
    assert "one target after the other" in (tmp_path / "report.md").read_text()


def test_a_target_that_dies_leaves_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with TimedServer(model="m") as sound, TimedServer(fault="dies", after=12, model="m") as dying:
        flags = ["--target", f"a={sound.url}", "--target", f"b={dying.url}", "--concurrency", "1,2", "--no-quality"]
        code, document, said = compare(capsys, tmp_path, *flags, "--num-prompts", "4", "--warmups", "0")
    assert code == 1
    assert "takes no more connections" in said
    assert len(document["targets"]["a"]["results"]) == 2
    assert document["targets"]["b"]["results"][0]["repeats"][0]["completed"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "a={m}"], "at least two --target"),
        (["--target", "a={m}", "--target", "a={m}"], "names must differ"),
        (["--target", "a={m}", "--target", "b={n}"], "different names: a serves m, b serves n"),
        (["--target", "a={m}", "--target", "b=nybble"], "recipes need --model"),
        (["--target", "a={m}", "--target", "b=http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (  # … before anything is started
            ["--target", "a=nybble", "--target", "b=http://127.0.0.1:9", "--model", "tiny", "--order", "blocks"],
            "no server answers at http://127.0.0.1:9",
        ),
        (
            ["--target", "a=nybble", "--target", "b={m}", "--model", "tiny", "--order", "blocks"],
            "different names: a serves tiny, b serves m",
        ),
        (["--target", "a={m}", "--target", "b={m}", "--dataset", "{trace}"], "does not replay a trace's times"),
        (["--target", "a={m}", "--target", "b={m}", "--baseline", "c"], "the targets are a, b"),
        (["--target", "a={m}", "--target", "b={m}", "--concurrency", "1", "--request-rate", "1"], "give one"),
    ],
)
def test_bad_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, two_servers: dict[str, str], flags: list[str], message: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 4, "output_length": 2}\n' * 3)
    code, _, said = compare(capsys, tmp_path, *(flag.format(**two_servers, trace=trace) for flag in flags))
    assert code == 2
    assert message in said
    assert "starting" not in said


@pytest.fixture(scope="module")
def two_servers():
    with TimedServer(model="m") as one, TimedServer(model="n") as other:
        yield {"m": one.url, "n": other.url}


def test_sigterm_stops_the_engines_that_were_started(tmp_path: Path) -> None:
    """… and keeps what was measured."""
    command = [sys.executable, "-m", "nybble", "compare", "--model", "tiny", "--out", str(tmp_path), "--no-quality"]
    command += ["--target", f"a=nybble {TINY_FLAGS}", "--target", f"b=nybble {TINY_FLAGS}", "--num-prompts", "8"]
    command += ["--concurrency", "1", "--repeats", "200", "--input-len", "8", "--output-len", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    file = tmp_path / "target-b.json"
    while not (file.exists() and json.loads(file.read_text())["results"]):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ports = [re.search(r"--port (\d+)", line) for line in children_of(process.pid)]
    engines = [match[1] for match in ports if match]
    assert len(engines) == 2
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: stopping what was started" in said
    for port in engines:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 1).close()
    assert json.loads(file.read_text())["results"][0]["repeats"]


def children_of(pid: int) -> list[str]:
    """Command lines."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [child for task in tasks for child in task.read_text().split()]
    return [Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode() for child in pids]


def test_an_engine_that_dies_while_it_is_measured_is_quoted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    server = Path(__file__).parent.parent / "support" / "timed_server.py"
    options = json.dumps({"ttft": 0, "itl": 0, "fault": "dies", "after": 6, "tokens_per_event": 1, "model": "m"})
    options = options.replace("}", ', "port": {port}}')  # compare fills it in
    command = [
        "sh",
        "-c",
        "echo 'RuntimeError: out of memory, say'; exec $0 $1 \"$2\"",
        "{python}",
        str(server),
        options,
    ]
    recipe = tmp_path / "dying.yaml"
    recipe.write_text(json.dumps({"command": command, "ready": "/v1/models"}))
    with TimedServer(model="m") as sound:
        flags = ["--target", f"a={sound.url}", "--target", f"b={recipe}", "--model", "m", "--no-quality"]
        code, document, said = compare(capsys, tmp_path / "out", *flags, "--num-prompts", "4", "--warmups", "0")
    assert code == 1, said
    assert "b: the last that it said: RuntimeError: out of memory, say" in said
    assert any("out of memory, say" in failure for failure in document["failures"])


def test_a_finished_comparison_is_resumed_without_measuring(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with TimedServer(model="m") as one, TimedServer(model="m") as other:
        flags = ["--target", f"a={one.url}", "--target", f"b={other.url}", "--num-prompts", "2", "--no-quality"]
        _, before, _ = compare(capsys, tmp_path, *flags)
        num_requests = len(one.truth())
        code, after, _ = compare(capsys, tmp_path, *flags, "--resume")
        assert len(one.truth()) - num_requests <= 2  # the probe's
    assert code == 0
    assert after["table"] == before["table"]
