"""`nybble bench step`, and the runner's own way to time a step."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.paged_model import PagedModel
from support.runner_driver import Driver, small_config

from nybble.cli import main
from nybble.core.errors import ConfigError
from nybble.llm import LLM
from nybble.perf.ceilings import Ceilings
from nybble.perf.model_shape import read_model
from nybble.perf.step_bench import StepBench, tokens_needed
from nybble.perf.step_cost import Work, parts_of
from nybble.runner.model_runner import ModelRunner

CEILINGS = Ceilings(read_bytes_per_second=1e9, flops_per_second=1e10, dtype="float32", how="for this test")
SMALL = {"kv_cache_memory_bytes": 8_000_000, "max_num_seqs": 4, "max_model_len": 200, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", **SMALL) as llm:  # type: ignore[arg-type]
        yield llm


def test_a_step_is_timed_at_its_batch_and_context(llm: LLM) -> None:
    bench = StepBench(llm, CEILINGS, 30)
    found = bench.measure(3, num_steps=2)
    assert 0 < found["device_ms"] < 1000
    assert 0 < found["wall_ms"] < 1000
    assert found["host_loss"] == pytest.approx(1 - found["device_ms"] / found["wall_ms"])
    assert found["tok_s"] == pytest.approx(3 / found["wall_ms"] * 1e3)
    parts = parts_of(read_model("tiny"), Work.decode(3, 30), torch.bfloat16)
    assert found["bytes"] == sum(part.num_bytes for part in parts)
    assert found["read_share"] == pytest.approx(found["bytes"] / found["device_ms"] * 1e3 / 1e9)
    assert found["roofline_share"] == pytest.approx(found["roofline_ms"] / found["device_ms"])


def test_the_engine_is_free_afterwards(llm: LLM) -> None:
    bench = StepBench(llm, CEILINGS, 20)
    bench.measure(2, num_steps=1)
    assert not llm.engine.has_work
    assert llm.stats.num_kv_blocks_used == 0
    before = llm.generate("1 + 1 =")[0].outputs[0].token_ids
    bench.measure(4, num_steps=1)
    assert llm.generate("1 + 1 =")[0].outputs[0].token_ids == before


def test_a_cache_too_small_for_the_batch_is_an_error() -> None:
    with LLM("tiny", device="cpu", **{**SMALL, "kv_cache_memory_bytes": 700_000}) as llm:  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"a batch of 4 with \d+ tokens each does not fit in the KV cache"):
            StepBench(llm, CEILINGS, 100).measure(4, num_steps=2)
        assert not llm.engine.has_work


@pytest.mark.parametrize(("batch", "context_len", "num_batched"), [(1, 10, 512), (8, 1000, 512), (64, 7, 64)])
def test_enough_tokens_are_asked_for(batch: int, context_len: int, num_batched: int) -> None:
    """The first sequence decodes while the others are read, in what the step has room for beside all that decode."""
    steps, left = 0, batch * context_len
    while left > 0:
        left -= max(1, num_batched - batch)
        steps += 1
    assert tokens_needed(batch, context_len, 16, num_batched) > steps + 16


def test_a_timed_step_changes_only_the_sequences_that_it_repeats() -> None:
    model = PagedModel()
    driver = Driver(ModelRunner(model, small_config(), num_blocks=64))
    prompts = [[3, 5, 7, 11], [2, 4], [9, 8, 7]]
    for slot, prompt in enumerate(prompts):
        driver.add(slot, prompt)
    driver.prefill(0, 1, 2)
    driver.step({0: 1, 1: 1})
    assert all(seconds > 0 for seconds in driver.runner.time_decode_step(2, 3))
    assert driver.generate(2, num_tokens=4) == [model.greedy(prompts[2], 5)]


@pytest.mark.gpu
def test_a_graph_is_timed_between_events() -> None:
    model = PagedModel(device="cuda")
    for eager in (False, True):
        runner = ModelRunner(model, small_config(device="cuda", enforce_eager=eager), num_blocks=64)
        runner.capture_graphs()
        driver = Driver(runner)
        for slot, prompt in enumerate([[3, 5, 7, 11], [2, 4], [9, 8, 7]]):
            driver.add(slot, prompt)
        driver.prefill(0, 1, 2)
        driver.step({0: 1, 1: 1, 2: 1})
        times = runner.time_decode_step(3, 5)
        assert len(times) == 5
        assert all(1e-6 < seconds < 0.1 for seconds in times)
        runner.close()


@pytest.mark.gpu
def test_a_step_on_a_gpu() -> None:
    with LLM("tiny", device="cuda", **{**SMALL, "kv_cache_memory_bytes": 64_000_000}) as llm:  # type: ignore[arg-type]
        found = StepBench(llm, CEILINGS, 30).measure(4, num_steps=16)
    assert 0 < found["device_ms"] < found["wall_ms"] * 1.1


def bench(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as end:
        main(["bench", "step", *more])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out.strip().splitlines(), said.err


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.perf.ceilings.measure_ceilings", lambda device, dtype: CEILINGS)
    file = tmp_path / "s.json"
    flags = ["--device", "cpu", "--batch-sizes", "1,2", "--context-len", "9", "--num-steps", "2", "--repeats", "2"]
    code, lines, _ = bench(capsys, "tiny", *flags, "--kv-cache-memory-bytes", "8000000", "-o", str(file))
    assert code == 0
    last, document = json.loads(lines[-1]), json.loads(file.read_text())
    assert [row["batch"] for row in last["results"]] == [1, 2]
    assert last["ceilings"]["read_bytes_per_second"] == 1e9
    assert document["complete"]
    assert document["engine"]["enable_prefix_caching"] == "False"
    assert all(len(row["repeats"]) == 2 for row in document["results"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tiny", "--batch-sizes", "x"], "whole numbers"),
        (["tiny", "--context-len", "2040"], "--context-len 2040: with the"),
        (["--synthetic", "gpt"], "there are qwen2.5-0.5b-awq"),
        (["--repeats", "1"], "give a MODEL, or --synthetic"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    code, _, said = bench(capsys, *flags)
    assert code == 2
    assert message in said
