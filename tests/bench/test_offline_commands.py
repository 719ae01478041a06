"""`nybble bench latency`, `throughput` and `startup` on the embedded model and on a synthetic shape."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nybble.bench.synthetic import CONFIGS, synthetic_directory
from nybble.cli import main
from nybble.models.checkpoint import Checkpoint

KV = ["--kv-cache-memory-bytes", "8000000"]


def bench(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the last line's JSON ({} if nothing was printed), what was said on standard error."""
    with pytest.raises(SystemExit) as end:
        main(["bench", *flags])
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    return end.value.code or 0, json.loads(lines[-1]) if lines else {}, said.err  # type: ignore[return-value]


def test_latency_tells_prefill_and_decode_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "l.json"
    flags = ["latency", "tiny", *KV, "--batch-sizes", "1,3", "--input-len", "9", "--output-len", "12"]
    code, last, _ = bench(capsys, *flags, "--repeats", "2", "-o", str(file))
    assert code == 0
    assert [row["batch"] for row in last["results"]] == [1, 3]
    document = json.loads(file.read_text())
    for row in document["results"]:
        assert row["tokens_repeat"] is True
        for repeat in row["repeats"]:
            decode_seconds = repeat["latency_seconds"] - repeat["prefill_seconds"]
            assert repeat["decode_tok_s"] == pytest.approx(row["batch"] * 12 / decode_seconds)
            assert repeat["prefill_tok_s"] == pytest.approx(row["batch"] * 9 / repeat["prefill_seconds"])
    assert document["engine"]["enable_prefix_caching"] == "False"
    assert document["startup"]["weights_bytes"] > 0
    before = file.read_text()
    code, again, _ = bench(capsys, *flags, "--repeats", "2", "-o", str(file), "--resume")
    assert again["results"] == last["results"]
    assert json.loads(file.read_text())["results"] == json.loads(before)["results"]


def test_throughput(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dataset = tmp_path / "p.jsonl"
    dataset.write_text('{"prompt": "Count from 3 to 12.", "max_tokens": 5}\n{"prompt": "What is 1 + 2?"}\n')
    flags = ["throughput", "tiny", *KV, "--num-prompts", "4", "--repeats", "1"]
    code, last, _ = bench(capsys, *flags, "--input-len", "4-9", "--output-len", "6")
    assert code == 0
    (row,) = last["results"]
    assert row["output_throughput"] == pytest.approx(4 * 6 / row["elapsed_time"])
    code, last, _ = bench(capsys, *flags, "--dataset", str(dataset))
    (row,) = last["results"]
    assert row["output_throughput"] == pytest.approx(2 * (5 + 64) / row["elapsed_time"])


@pytest.mark.slow
def test_startup_by_phase(capsys: pytest.CaptureFixture[str]) -> None:
    code, last, _ = bench(capsys, "startup", "tiny", *KV, "--repeats", "1")
    assert code == 0
    cold, warm = last["results"]
    assert (cold["label"], warm["label"]) == ("cold", "warm")
    for row in (cold, warm):
        phases = [value for name, value in row.items() if name.endswith("_seconds") and name != "total_seconds"]
        assert len(phases) == 6
        assert sum(phases) == pytest.approx(row["total_seconds"], rel=0.1)


@pytest.mark.slow
def test_a_synthetic_shape_runs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--synthetic", "qwen2.5-0.5b-awq", *KV, "--input-len", "4", "--output-len", "2", "--repeats", "1"]
    code, last, _ = bench(capsys, "latency", *flags)
    assert code == 0
    assert last["results"][0]["decode_tok_s"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_synthetic_configs_are_of_families_that_nybble_runs(name: str) -> None:
    with synthetic_directory(name) as path:
        assert Checkpoint.open(Path(path)).facts().vocab_size > 100_000


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "latency", "tiny"),
        ("bench", "throughput", "tiny"),
        ("bench", "startup", "tiny"),
        ("bench", "step", "tiny"),
        ("bench", "kernels", "tiny"),
        ("bench", "serve", "--base-url", "http://127.0.0.1:9"),
        ("advise", "tiny", "--concurrency", "4"),
    ],
)
def test_where_results_cannot_go_shows_before_anything_is_measured(
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loading a model, finding a server and measuring the machine all fail here."""
    for name in ("nybble.llm.LLM", "nybble.perf.ceilings.measure_ceilings", "nybble.bench.startup.measure"):
        monkeypatch.delattr(name)
    monkeypatch.delattr("nybble.bench.target.served_model")
    closed = tmp_path / "closed"
    closed.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (closed, os.W_OK))
    cases = (
        (tmp_path / "no" / "x", f"{tmp_path / 'no'} is no directory"),
        (tmp_path, "is a directory; give a file's name"),
        (closed, "may not be written"),
    )
    for flag, (path, message) in itertools.product(("--output", "--csv") if "bench" in words else ("--output",), cases):
        with pytest.raises(SystemExit) as end:
            main([*words, flag, str(path)])
        assert end.value.code == 2
        assert f"{flag} {path}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["latency"], "give a MODEL, or --synthetic"),
        (["latency", "tiny", "--synthetic", "qwen2.5-7b-awq"], "give a MODEL, or --synthetic"),
        (["latency", "--synthetic", "gpt"], "there are qwen2.5-0.5b-awq"),
        (["latency", "tiny", "--batch-sizes", "0"], "at least 1"),
        (["latency", "tiny", "--input-len", "100000"], "max_model_len"),
        (["throughput", "tiny", "--input-len", "x"], "--input-len x"),
        (["startup", "no/such"], "no/such"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    code, _, said = bench(capsys, *flags, "--repeats", "1")
    assert code == 2
    assert message in said
