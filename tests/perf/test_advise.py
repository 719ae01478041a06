"""`nybble advise`: what is recommended follows from memory, objectives and load; what is measured has the last word."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nybble.bench.synthetic import synthetic_config
from nybble.cli import main
from nybble.core.config import EngineConfig
from nybble.core.errors import ConfigError, MemoryBudgetError
from nybble.llm import LLM
from nybble.perf.advice import Advice, advise
from nybble.perf.machines import Machine, describe, find_machine
from nybble.perf.memory_model import MOST_UTILIZATION, plan_memory
from nybble.perf.model_shape import ModelShape, read_model
from nybble.perf.planner import HALF
from nybble.perf.refine import Tried, chosen, refine
from nybble.perf.roofline import Roofline
from nybble.perf.setting import Setting, serve_command
from nybble.perf.step_cost import Work
from nybble.perf.trial import Trial, run_trial
from nybble.perf.workload_model import (
    CPU_FACTOR,
    Load,
    expected_decode_seconds,
    expected_prefill_seconds,
    most_seqs,
    outcome,
    seqs_for_rate,
)

H200, RTX = find_machine("H200"), find_machine("RTX 3090")


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return ModelShape.read(synthetic_config("qwen2.5-32b-awq"))


def load(**changes: Any) -> Load:
    return Load(**{"input_len": 512, "output_len": 128, "concurrency": 16} | changes)


def test_all_streams_run_where_nothing_forbids_it(qwen: ModelShape) -> None:
    advice = advise(qwen, H200, load())
    assert advice.num_devices == 1
    assert advice.value("max_num_seqs") == 16
    assert advice.value("max_model_len") == 640
    assert advice.value("gpu_memory_utilization") == 0.9
    assert advice.notes == []
    assert advice.expected.output_tok_s < advice.limit.output_tok_s


def test_an_objective_bounds_the_batch(qwen: ModelShape) -> None:
    advice = advise(qwen, H200, load(concurrency=64, tpot_ms=15))
    num_seqs = advice.value("max_num_seqs")
    assert 1 < num_seqs < 64
    assert advice.expected.tpot_ms <= 15
    assert any("keep the objectives" in note for note in advice.notes)


def test_an_impossible_objective_is_said(qwen: ModelShape) -> None:
    advice = advise(qwen, H200, load(tpot_ms=1))
    assert any("the objectives cannot be kept: a single sequence takes about" in note for note in advice.notes)


def test_kv_memory_bounds_the_batch(qwen: ModelShape) -> None:
    """One RTX 3090 holds the weights of 19.3 GB and little more."""
    advice = advise(qwen, RTX, load(concurrency=64))
    num_seqs = advice.value("max_num_seqs")
    assert num_seqs < 64
    assert advice.value("gpu_memory_utilization") > 0.9
    assert num_seqs * 640 <= advice.memory.most_kv_tokens
    assert any("streams wait" in note for note in advice.notes)
    assert [fits for outcome, _, fits in advice.by_seqs if outcome.num_seqs == 64] == [False]


def test_the_fewest_devices_that_hold_the_load(qwen: ModelShape) -> None:
    advice = advise(qwen, RTX, load(concurrency=64), num_devices=4)
    assert advice.num_devices == 2
    assert advice.value("tensor_parallel_size") == 2
    assert "2 such engines side by side" in advice.settings[0].why
    assert advise(qwen, H200, load(), num_devices=8).num_devices == 1


def test_a_model_too_large_says_how_many_devices_it_takes() -> None:
    large = ModelShape.read(synthetic_config("qwen2.5-72b-awq"))
    with pytest.raises(ConfigError, match=r"do not fit on 1 × RTX 3090 of 26 GB; 2 of them do: --num-devices 2"):
        advise(large, RTX, load())


def card(memory_gb: float, link_gb_s: float | None = 25) -> Machine:
    return describe("Mine", memory_gb=memory_gb, read_gb_s=900, tflops=70, link_gb_s=link_gb_s)


@pytest.mark.parametrize("memory_gb", [22.5, 23, 23.5, 24, 25, 40])
@pytest.mark.parametrize("asked", [load(concurrency=4), load(concurrency=None, request_rate=0.2)])
def test_what_is_chosen_fits_in_what_may_be_used(qwen: ModelShape, memory_gb: float, asked: Load) -> None:
    """And one device is chosen only where it holds what is asked for."""
    advice = advise(qwen, card(memory_gb), asked, num_devices=2)
    utilization, num_seqs = advice.value("gpu_memory_utilization"), advice.value("max_num_seqs")
    assert utilization <= MOST_UTILIZATION
    assert num_seqs * asked.tokens <= advice.memory.kv_tokens(utilization)
    assert num_seqs == 4 or asked.concurrency is None


def test_memory_that_only_whole_utilization_holds_takes_one_device_more(qwen: ModelShape) -> None:
    """Between the room at 97 % and at 100 %: four requests are 2560 tokens of 262,144 bytes, 3 % of 23.2 GB is 0.7."""
    machine = card(23.2)
    plan = plan_memory(qwen, machine, 2, max_num_seqs=4, max_num_batched_tokens=512)
    assert plan.kv_tokens(MOST_UTILIZATION) < 4 * 640 < plan.kv_tokens(1.0)
    assert advise(qwen, machine, load(concurrency=4), num_devices=2).num_devices == 2


def test_little_memory_makes_steps_shorter(qwen: ModelShape) -> None:
    tight, wide = (advise(qwen, card(memory_gb), load(concurrency=4)) for memory_gb in (23.6, 40))
    assert (tight.value("max_num_batched_tokens"), wide.value("max_num_batched_tokens")) == (512, 1024)
    why = {setting.name: setting.why for setting in tight.settings}
    assert "longer ones leave too little memory" in why["max_num_batched_tokens"]


@pytest.mark.parametrize("memory_gb", [9, 11, 12.2, 12.6])
def test_the_number_of_devices_that_a_refusal_names_is_enough(memory_gb: float) -> None:
    shape, machine = ModelShape.read(synthetic_config("qwen2.5-14b-awq")), card(memory_gb)
    with pytest.raises(ConfigError, match="do not fit on 1 × Mine") as refused:
        advise(shape, machine, load())
    enough = int(str(refused.value).rpartition(" ")[2])
    assert enough > 1
    assert advise(shape, machine, load(), enough).num_devices == enough


def test_an_unknown_link_is_no_free_one(qwen: ModelShape) -> None:
    with pytest.raises(ConfigError, match=r"--num-devices 2: nothing is known of the link .* give --link-gb-s"):
        advise(qwen, card(24, None), load(), num_devices=2)
    assert advise(qwen, card(40, None), load()).num_devices == 1


def test_more_streams_than_logits_have_room_for_wait(qwen: ModelShape) -> None:
    """5000 sequences' logits alone would be 24 GB."""
    advice = advise(qwen, card(40), load(concurrency=5000))
    assert 1 < advice.value("max_num_seqs") < 200


def test_a_request_too_long_is_refused(qwen: ModelShape) -> None:
    with pytest.raises(ConfigError, match=r"a request of 20000 tokens does not fit: .*; 2 do: --num-devices 2"):
        advise(qwen, RTX, load(input_len=19_872), num_devices=1)
    assert advise(qwen, RTX, load(input_len=19_872, concurrency=1), num_devices=2).num_devices == 2


def test_a_request_longer_than_the_model_takes_is_not_one_for_more_devices(qwen: ModelShape) -> None:
    with pytest.raises(ConfigError, match="make 40000 tokens, more than the model's 32768 positions"):
        advise(qwen, RTX, load(input_len=39_872), num_devices=1)


def test_a_rate_that_the_objectives_forbid_is_said_with_the_highest_that_they_allow(qwen: ModelShape) -> None:
    asked = load(concurrency=None, request_rate=9.0, tpot_ms=12)
    advice = advise(qwen, H200, asked)
    note = next(note for note in advice.notes if "the objectives forbid 9 requests a second" in note)
    highest = float(note.split("serve about ")[1].split()[0])
    assert 0 < highest < 9
    allowed = advise(qwen, H200, load(concurrency=None, request_rate=highest * 0.99, tpot_ms=12))
    assert not any("forbid" in note for note in allowed.notes)
    assert advise(qwen, H200, load(concurrency=None, request_rate=9.0)).notes == []


def test_a_rate_takes_the_devices_that_keep_its_objectives(qwen: ModelShape) -> None:
    advice = advise(qwen, H200, load(concurrency=None, request_rate=9.0, tpot_ms=12), num_devices=8)
    assert advice.num_devices > 1
    assert not any("forbid" in note for note in advice.notes)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (load(tpot_ms=10), "even the shortest step that takes in a prompt, 512 tokens, holds up"),
        (load(concurrency=1, tpot_ms=4), "the objectives cannot be kept: a single sequence"),
        (load(concurrency=None, request_rate=9.0, tpot_ms=12), "the objectives forbid 9"),
    ],
)
def test_a_remedy_that_is_named_is_enough(qwen: ModelShape, asked: Load, said: str) -> None:
    advice = advise(qwen, H200, asked)
    assert any(said in note for note in advice.notes)
    named = re.findall(r"(\d+) × ([\w ]+?) (?:or|would)", advice.notes[-1])
    assert named
    for devices, name in named:
        better = advise(qwen, find_machine(name), asked, int(devices))
        assert better.num_devices == int(devices)
        assert better.expected.keeps(asked)
        assert not any(
            word in note for note in better.notes for word in ("forbid", "cannot", "shortest", "would serve")
        )


def test_an_objective_that_nothing_keeps_has_no_remedy(qwen: ModelShape) -> None:
    notes = advise(qwen, H200, load(tpot_ms=0.01)).notes
    assert any("no machine of the table, nor up to 16 of one together, would" in note for note in notes)


def test_a_rate_needs_so_many_sequences(qwen: ModelShape) -> None:
    steady = advise(qwen, H200, load(concurrency=None, request_rate=2.0))
    busy = advise(qwen, H200, load(concurrency=None, request_rate=6.0))
    assert steady.value("max_num_seqs") < busy.value("max_num_seqs")
    assert busy.expected.requests_per_second >= 6.0
    flood = advise(qwen, H200, load(concurrency=None, request_rate=500.0))
    assert any("the queue would grow without end" in note for note in flood.notes)


def test_the_study_s_memory_limit(qwen: ModelShape) -> None:
    """Two RTX 3090 were stable at cache_max_entry_count 0.85 and broke at 0.9 with more than five at once: steps of
    8192 tokens (LMDeploy's default) leave room up to a share between the two."""
    plan = plan_memory(qwen.split_by(2), RTX, 2, max_num_seqs=8, max_num_batched_tokens=8192)
    assert 0.85 < plan.room_bytes / plan.free_bytes < 0.93
    advice = advise(qwen, RTX, load(concurrency=64), num_devices=2)
    why = next(setting.why for setting in advice.settings if setting.name == "cache_max_entry_count")
    assert advice.value("cache_max_entry_count") <= float(why.split("above ")[1].split()[0])


def test_what_is_recommended_are_settings_of_the_engine(qwen: ModelShape) -> None:
    words = serve_command("m", advise(qwen, H200, load()).settings).split()
    settings = {flag[2:].replace("-", "_"): value for flag, value in zip(words[3::2], words[4::2], strict=True)}
    EngineConfig.from_settings(
        model="m", **{name: float(value) if "." in value else int(value) for name, value in settings.items()}
    )
    assert set(settings) == {"max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization"}


def test_the_command_line_can_be_pasted(qwen: ModelShape) -> None:
    words = serve_command("my models/a", advise(qwen, H200, load(), on_gpu=False).settings, on_gpu=False)
    assert words.startswith("nybble serve 'my models/a' --device cpu --max-num-seqs 16 ")
    assert "--kv-cache-memory-bytes" in words


def test_expected_steps_meet_those_measured(qwen: ModelShape) -> None:
    """Data-sheet rates and 3 µs a launch, nothing else, against bench/results."""
    path = Path(__file__).parents[2] / "bench" / "results" / "latency-qwen2.5-32b-awq-h100-fp16.json"
    rows = json.loads(path.read_text())["results"]
    roofline = Roofline(qwen, find_machine("H100").sustained(), HALF)
    for row in rows:
        work = Work.decode(row["batch"], row["input_len"] + row["output_len"] // 2)
        assert expected_decode_seconds(roofline, work) * 1e3 == pytest.approx(row["decode_step_ms"], rel=0.06)
    large = max(rows, key=lambda row: row["batch"])
    tokens = 8192  # what a step takes of its prompts
    assert tokens / expected_prefill_seconds(roofline, tokens) == pytest.approx(large["prefill_tok_s"], rel=0.05)


MEASURED_ON_A_CPU = {
    "tiny": {1: 1.36, 4: 2.11, 8: 2.60, 16: 3.20},
    "qwen2.5-0.5b-awq": {1: 24.6, 4: 33.5, 8: 44.0, 16: 72.6},
    "qwen2.5-1.5b-awq": {1: 51.8, 4: 77.5, 8: 110.8, 16: 188.1},
}
"""ms of a decode step at 160 tokens of context, by batch: `profile` on two cores of an EPYC, whose rates `cpu` has."""


@pytest.mark.parametrize("model", MEASURED_ON_A_CPU)
def test_expected_steps_meet_those_measured_on_a_cpu(model: str) -> None:
    cpu = Machine(
        name="EPYC",
        memory_bytes=64e9,
        read_bytes_per_second=48.5e9,
        flops_per_second=0.95e12,
        int4_flops_per_second=0.37e12,
        is_measured=True,
    )
    shape = read_model("tiny") if model == "tiny" else ModelShape.read(synthetic_config(model))
    roofline = Roofline(shape, cpu, HALF)
    factor = CPU_FACTOR if model == "tiny" else 1.2
    for batch, milliseconds in MEASURED_ON_A_CPU[model].items():
        expected = expected_decode_seconds(roofline, Work.decode(batch, 160)) * 1e3
        assert 1 / factor < milliseconds / expected < factor, batch


def test_the_workload_model_is_consistent(qwen: ModelShape) -> None:
    roofline, asked = Roofline(qwen, H200.sustained(), HALF), load(tpot_ms=20)
    outcomes = [outcome(roofline, asked, n) for n in range(1, 65)]
    assert [o.tpot_ms for o in outcomes] == sorted(o.tpot_ms for o in outcomes)
    best = most_seqs(roofline, asked, 64)
    assert outcomes[best - 1].keeps(asked)
    assert not outcomes[best].keeps(asked)
    for each in outcomes:  # Little's law, and output tokens are those of the requests
        assert each.requests_per_second * each.life_seconds == pytest.approx(each.num_seqs)
        assert each.output_tok_s == pytest.approx(each.requests_per_second * 128)
    rate = outcomes[9].requests_per_second
    found = seqs_for_rate(roofline, load(concurrency=None, request_rate=rate * 0.999), 64)
    assert found is not None
    assert found <= 10


def trial(output_tok_s: float, tpot_p90_ms: float = 1.0) -> Trial:
    return Trial(
        output_tok_s=output_tok_s,
        ttft_ms=1,
        ttft_p90_ms=1,
        tpot_ms=tpot_p90_ms,
        tpot_p90_ms=tpot_p90_ms,
        num_requests=1,
        num_preemptions=0,
    )


def test_a_neighbour_must_be_worth_it() -> None:
    base = Tried({}, [trial(100), trial(102), trial(104)])
    assert not Tried({}, [trial(104)]).is_better_than(base, load()), "within chance"
    assert Tried({}, [trial(106)]).is_better_than(base, load())
    assert not Tried({}, [trial(103), trial(110), trial(111)]).is_better_than(base, load()), "repeats overlap"
    slow, late = load(tpot_ms=5), Tried({}, [trial(500, tpot_p90_ms=9)])
    assert not late.is_better_than(base, slow), "faster, but it breaks the objective"
    assert base.is_better_than(late, slow)


class Runs:
    """Stands in for engines: what `speed` says of a choice of settings, None: it does not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: Callable[[dict[str, Any]], float | None]) -> None:
        self.speed = speed
        monkeypatch.setattr("nybble.perf.refine.opened_model", self.opened_model)
        monkeypatch.setattr("nybble.perf.refine.run_trial", lambda found, load, num_requests, seed: trial(found))

    @contextmanager
    def opened_model(self, model: str, synthetic: None, settings: dict[str, Any]) -> Iterator[float]:
        found = self.speed(settings)
        if found is None:
            raise MemoryBudgetError("too little")
        yield found

    def refine(self, advice: Advice, asked: Load) -> tuple[dict[str, Setting], list[Tried]]:
        settings, tried = refine("m", None, {}, advice, asked, num_requests=1, repeats=1, report=lambda tried: None)
        return {setting.name: setting for setting in settings}, tried


def test_a_neighbour_that_does_not_fit_is_passed_over(qwen: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = advise(qwen, RTX, load(concurrency=4))
    tokens = advice.value("max_num_batched_tokens")
    runs = Runs(monkeypatch, lambda settings: None if settings["max_num_batched_tokens"] > tokens else 100.0)
    settings, tried = runs.refine(advice, load(concurrency=4))
    assert [each.settings["max_num_seqs"] for each in tried] == [4, 4, 2]
    assert advice.notes == [f"max_num_batched_tokens {2 * tokens} was not measured: too little"]
    assert settings["max_num_batched_tokens"].why.endswith(f"; {tokens // 2}, measured, brought no more")
    assert settings["max_num_seqs"].why.endswith("; 2, measured, brought no more")


def test_nothing_is_said_of_neighbours_that_were_not_measured(
    qwen: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = load(concurrency=1)
    advice = advise(qwen, H200, asked)
    alone = [advice.value(name) for name in ("max_num_seqs", "max_num_batched_tokens")]
    runs = Runs(monkeypatch, lambda s: 1.0 if [s["max_num_seqs"], s["max_num_batched_tokens"]] == alone else None)
    settings, tried = runs.refine(advice, asked)
    assert len(tried) == 1
    assert not any("measured" in setting.why for setting in settings.values())


def test_a_better_neighbour_takes_the_place(qwen: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = advise(qwen, H200, load())
    tokens = advice.value("max_num_batched_tokens")
    settings, _ = Runs(monkeypatch, lambda settings: settings["max_num_batched_tokens"]).refine(advice, load())
    assert settings["max_num_batched_tokens"] == Setting(
        "max_num_batched_tokens", 2 * tokens, f"measured: {2 * tokens:,.1f} tok/s against {tokens:,.1f} with {tokens}"
    )


def test_each_choice_that_was_tried_says_why_it_was_taken_or_not(
    qwen: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = advise(qwen, H200, load())
    tokens = advice.value("max_num_batched_tokens")
    speeds = {tokens: 100.0, tokens // 2: 110.0, tokens * 2: 111.0}
    runs = Runs(monkeypatch, lambda s: speeds[s["max_num_batched_tokens"]] * (1.0 if s["max_num_seqs"] == 16 else 0.5))
    settings, tried = runs.refine(advice, load())
    assert [each.verdict for each in tried] == [
        "the recommendation",
        f"taken: +10.0% against max_num_batched_tokens {tokens}",
        f"not taken: +0.9% against max_num_batched_tokens {tokens // 2}, which may be chance",
        "not taken: -50.0% against max_num_seqs 16",
    ]
    assert chosen(list(settings.values()), tried) is tried[1]


def test_what_breaks_the_objectives_is_not_said_to_bring_less(
    qwen: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = load(concurrency=8, tpot_ms=50)
    advice = advise(qwen, H200, asked)
    tokens = advice.value("max_num_batched_tokens")
    runs = Runs(monkeypatch, lambda s: 100.0 + s["max_num_batched_tokens"])
    broken = lambda speed, *_: trial(speed, tpot_p90_ms=99.0 if speed > 100 + tokens else 1.0)  # noqa: E731
    monkeypatch.setattr("nybble.perf.refine.run_trial", broken)
    settings, tried = runs.refine(advice, asked)
    why = settings["max_num_batched_tokens"].why
    assert f"; {tokens // 2}, measured, brought no more; {tokens * 2}, measured, broke the objectives" in why
    verdicts = [each.verdict for each in tried]
    assert f"not taken: breaks the objectives, unlike max_num_batched_tokens {tokens}" in verdicts


def test_a_recommendation_that_does_not_fit_is_an_error(qwen: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryBudgetError):
        Runs(monkeypatch, lambda settings: None).refine(advise(qwen, H200, load()), load())


def test_a_trial_serves_its_load() -> None:
    with LLM("tiny", device="cpu", max_num_seqs=4, max_model_len=64, enable_prefix_caching=False) as llm:
        closed = run_trial(llm, load(input_len=8, output_len=4, concurrency=2), 5, "a")
        opened = run_trial(llm, load(input_len=8, output_len=4, concurrency=None, request_rate=200.0), 5, "b")
    for found in (closed, opened):
        assert found.num_requests == 5
        assert found.output_tok_s > 0
        assert 0 < found.ttft_ms <= found.ttft_p90_ms
        assert 0 < found.tpot_ms <= found.tpot_p90_ms


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["advise", *arguments])
    return int(exit_.value.code or 0)


def test_the_command_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "advice.json"
    arguments = ("--synthetic", "qwen2.5-32b-awq", "--device", "H200", "--concurrency", "16", "--input-len", "512")
    assert run(*arguments, "--output-len", "128", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    last = json.loads(shown.splitlines()[-1])
    document = json.loads(output.read_text())
    assert last["settings"]["max_num_seqs"] == 16
    assert {setting["name"]: setting["value"] for setting in document["settings"]} == last["settings"]
    assert all(setting["why"] in shown for setting in document["settings"])
    assert "nybble serve MODEL --max-num-seqs 16" in shown


@pytest.mark.slow
def test_measuring_refines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "advice.json"
    arguments = ("tiny", "--device", "cpu", "--concurrency", "4", "--input-len", "16", "--output-len", "8", "--measure")
    assert run(*arguments, "--num-prompts", "6", "--output", str(output)) == 0
    captured = capsys.readouterr()
    document = json.loads(output.read_text())
    tried = [
        (each["settings"]["max_num_seqs"], each["settings"]["max_num_batched_tokens"]) for each in document["tried"]
    ]
    assert len(tried) == len(set(tried)) >= 3
    assert captured.out.count("tried max_num_seqs") == len(tried)
    assert all(each["verdict"] in captured.out for each in document["tried"])
    last = json.loads(captured.out.splitlines()[-1])
    assert last["measured"]["output_tok_s"] > 0
    share = last["measured"]["output_tok_s"] / last["expected"]["output_tok_s"]
    assert f"; {share:.2f} of the tok/s expected" in captured.out
    assert last["expected"]["num_seqs"] == last["settings"]["max_num_seqs"]
    assert "nybble serve tiny --device cpu --max-num-seqs" in captured.out
    settings = {setting["name"]: setting["value"] for setting in document["settings"]}
    assert (settings["max_num_seqs"], settings["max_num_batched_tokens"]) in tried


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "give a load: --concurrency, or --request-rate"),
        (["tiny", "--concurrency", "1", "--request-rate", "1"], "give a load"),
        (["tiny", "--request-rate", "-1"], "--request-rate -1: must be above 0"),
        (["tiny", "--concurrency", "4", "--device", "H200", "--measure"], "--measure runs on this machine"),
        (
            ["tiny", "--concurrency", "4", "--device", "cpu", "--num-devices", "2"],
            "--num-devices 2: this machine's CPU",
        ),
        (["tiny", "--concurrency", "4", "--read-gb-s", "5"], "--read-gb-s describes a machine that is not here"),
        (["tiny", "--concurrency", "4", "--device", "H200", "--goodput", "e2el:5"], "--goodput e2el"),
        (["tiny", "--concurrency", "4", "--device", "H200", "--output", "/nowhere/x"], "/nowhere is no directory"),
        (
            ["tiny", "--concurrency", "4", "--device", "H200", "--input-len", "2000"],
            "make 2128 tokens, more than the model",
        ),
        (["/nowhere", "--concurrency", "4", "--device", "H200"], "/nowhere: no such directory"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
