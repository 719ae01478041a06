"""`nybble profile`: measured on tiny, drawn for machines that are not here, and put into words."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.bench.synthetic import synthetic_config
from nybble.cli import main
from nybble.core.errors import ConfigError
from nybble.llm import LLM
from nybble.perf.ceilings import Ceilings
from nybble.perf.explain import explain
from nybble.perf.located import located
from nybble.perf.machines import Machine, find_machine
from nybble.perf.model_shape import ModelShape
from nybble.perf.profile_document import Capacity, make_document, step_row
from nybble.perf.profile_engine import measurable, profile_engine
from nybble.perf.profile_report import kinds_table, markdown, parts_table, steps_table
from nybble.perf.profiling import dry_profile
from nybble.perf.roofline import Roofline
from nybble.perf.step_cost import Work
from nybble.perf.step_profile import PartTime, StepProfiler, StepTimes, steps_needed


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["profile", *arguments])
    return int(exit_.value.code or 0)


def last_line(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    """The study's own case: two RTX 3090."""
    shape = ModelShape.read(synthetic_config("qwen2.5-32b-awq"))
    return dry_profile(shape, find_machine("RTX 3090"), 2, [1, 4, 16, 64], [1024], 2048, {"model": "qwen2.5-32b-awq"})


def test_a_dry_run_draws_the_roofline(study: dict[str, Any]) -> None:
    steps = study["steps"]
    assert [(row["step"], row["batch"]) for row in steps[:4]] == [("decode", batch) for batch in (1, 4, 16, 64)]
    assert steps[0]["bound"] == "memory"
    assert steps[3]["bound"] == steps[4]["bound"] == "compute"
    for row in steps:
        assert row["wall_ms"] is None
        assert sum(kind["share"] for kind in row["kinds"]) == pytest.approx(1)
        assert sum(part["floor_ms"] for part in row["parts"]) == pytest.approx(row["floor_ms"])
    # 9.67 GB of weights on each device at 861 GB/s, and 128 exchanges of at least 25 µs.
    assert steps[0]["floor_ms"] == pytest.approx(8.99 / 0.861 + 128 * 0.025, rel=0.02)
    assert study["crossover_batch"] == 19
    assert not study["larger_batches"][-1]["fits"]


def test_the_explanation_covers_the_studys_causes(study: dict[str, Any]) -> None:
    text = explain(study)
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles == [
        "Where the time goes",
        "Memory or arithmetic",
        "Dequantization",
        "KV memory",
        "Communication",
        "Larger batches",
    ]
    for line in text.splitlines():
        assert not line.startswith("- ") or re.search(r"\d", line), f"a claim without a figure: {line}"
    assert "memory below a batch of 19:" in text
    assert "131,072 bytes" in text


def explained(machine: Machine, dtype: torch.dtype) -> str:
    roofline = Roofline(ModelShape.read(synthetic_config("qwen2.5-32b-awq")), machine, dtype)
    rows = [step_row("decode", Work.decode(batch, 4096), 4096, roofline, None) for batch in (1, 16)]
    capacity = Capacity(kv_tokens=100_000, source="a test")
    return explain(
        make_document(settings={}, whole=roofline, roofline=roofline, rows=rows, capacity=capacity, facts={})
    )


@pytest.mark.parametrize(("dtype", "times", "left"), [(torch.float16, 2, 1 / 2), (torch.float32, 4, 1 / 4)])
def test_eight_bits_save_by_what_the_cache_has(dtype: torch.dtype, times: int, left: float) -> None:
    machine = find_machine("H200").sustained()
    found = re.search(
        r"hold (\d) times as many tokens and take ([\d.]+) ms off attention's floor", explained(machine, dtype)
    )
    assert found is not None
    assert int(found[1]) == times
    # Keys and values of 16 × 4096 tokens; queries and outputs are little beside them.
    reading_ms = 16 * 4096 * 2 * 64 * 8 * 128 * dtype.itemsize / machine.read_bytes_per_second * 1e3
    assert float(found[2]) == pytest.approx(reading_ms * (1 - left), rel=0.01)


def test_a_machine_that_computes_slowly_is_bound_by_arithmetic() -> None:
    """Smaller keys spare it nothing, nor do larger batches share anything."""
    text = explained(replace(find_machine("H200"), flops_per_second=1e11), torch.float16)
    assert "and not make attention faster, which is bound by arithmetic, at batch 16" in text
    assert "bound by arithmetic from a batch of 1 on: each sequence adds its own time" in text
    assert "below a batch of 1:" not in text


def test_measured_parts_meet_their_floors() -> None:
    """As a GPU's kernels come: fused work has no time of its own, the output layer is the one dense product left."""
    shape = ModelShape.read(synthetic_config("qwen2.5-32b-awq"))
    roofline = Roofline(shape, replace(find_machine("H100").sustained(), is_measured=True), torch.float16)
    parts = [
        PartTime("qkv", "weight GEMMs", 0.8e-3, 64),
        PartTime("o", "weight GEMMs", 0.6e-3, 64),
        PartTime("gate_up", "weight GEMMs", 3.5e-3, 64),
        PartTime("down", "weight GEMMs", 1.8e-3, 64),
        PartTime("dense", "weight GEMMs", 0.6e-3, 1),
        PartTime("attention", "attention", 0.3e-3, 128),
        PartTime("rms_norm", "norms and activations", 0.2e-3, 129),
        PartTime("dequantize", "dequantization", 0.1e-3, 4),
    ]
    work = Work.decode(1, 1024)
    times = StepTimes(name="decode", work=work, context_len=1024, wall_seconds=[8.2e-3, 8e-3, 9e-3], parts=parts)
    row = step_row("decode", work, 1024, roofline, times)
    measured = {part["part"]: part["measured_ms"] for part in row["parts"]}
    assert measured["lm_head"] == pytest.approx(0.6)
    assert "dense" not in measured
    assert measured["rotary"] is None, "in qkv's kernel"
    kinds = {kind["kind"]: kind for kind in row["kinds"]}
    assert row["wall_ms"] == pytest.approx(8.2)
    assert kinds["host gaps"]["measured_ms"] == pytest.approx(8.2 - 7.9)
    assert sum(kind["share"] for kind in row["kinds"]) == pytest.approx(1)
    capacity = Capacity(kv_tokens=100_000, source="a test")
    document = make_document(
        settings={"model": "m"}, whole=roofline, roofline=roofline, rows=[row], capacity=capacity, facts={}
    )
    text = explain(document)
    assert f"the step reaches {100 * row['of_floor']:.0f} % of what the machine allows" in text
    assert "In a decode step of batch 1 at 1,024 tokens of context the products take 7.3 ms against a floor of" in text
    assert "within others" in str(kinds_table(document))
    assert [row["batch"] for row in document["larger_batches"]] == [2, 4, 8]
    assert document["larger_batches"][0]["expected_tok_s"] == pytest.approx(
        roofline.decode_tok_s(2, 1024) * row["of_floor"]
    )


@pytest.mark.parametrize(("times_the_floor", "bound"), [(1.9, "memory"), (2.1, "neither"), (11, "neither")])
def test_a_step_far_above_its_floor_is_bound_by_neither(times_the_floor: float, bound: str) -> None:
    roofline = Roofline(ModelShape.read(synthetic_config("qwen2.5-32b-awq")), find_machine("H100"), torch.float16)
    work = Work.decode(1, 1024)
    floor = roofline.seconds(work)
    parts = [PartTime("attention", "attention", floor / 4, 64)]
    walls = [floor * times_the_floor]
    times = StepTimes(name="decode", work=work, context_len=1024, wall_seconds=walls, parts=parts)
    row = step_row("decode", work, 1024, roofline, times)
    assert (row["bound"], row["floor_bound"]) == (bound, "memory")
    capacity = Capacity(kv_tokens=100_000, source="a test")
    text = explain(
        make_document(settings={}, whole=roofline, roofline=roofline, rows=[row], capacity=capacity, facts={})
    )
    assert ("Batch 1 at 1,024 tokens of context is bound by neither memory nor arithmetic" in text) == (
        bound == "neither"
    )
    assert ("most of them in host gaps" in text) == (bound == "neither")


def test_tables_have_a_cell_for_each_column(study: dict[str, Any]) -> None:
    for table in (steps_table(study), kinds_table(study), *(parts_table(row) for row in study["steps"])):
        assert len({len(row) for row in table}) == 1
        assert len(table) > 3


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--synthetic", "llama-3-8b-awq", "--dry-run", "--device", "H100", "--batch-sizes", "1,8")
    assert run(*arguments, "--explain", "--out", str(tmp_path / "new")) == 0
    shown = capsys.readouterr().out
    found = last_line(shown)
    document = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert [row["batch"] for row in found["results"]] == [1, 8, 1]
    assert found["results"][0]["floor_ms"] == document["steps"][0]["floor_ms"]
    assert (tmp_path / "new" / "profile.md").read_text() == markdown(document)
    assert "Dequantization" in shown
    assert "H100: reads 3,082 GB/s" in shown


def test_batches_that_memory_does_not_hold_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--synthetic", "qwen2.5-32b-awq", "--dry-run", "--device", "RTX 3090", "--num-devices", "2")
    assert run(*arguments, "--batch-sizes", "128,1,64,1", "--explain") == 0
    shown = capsys.readouterr()
    assert [row["batch"] for row in last_line(shown.out)["results"]] == [1, 64, 128, 1]
    assert re.findall(r"^warning: batch (\d+) at 1,024 tokens: ([\d,]+) tokens of KV are more", shown.err, re.M) == [
        ("128", "131,072")
    ]
    assert "Batch 128 at 1,024 tokens" in shown.out


def test_each_batch_is_drawn_at_each_context(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--synthetic", "qwen2.5-32b-awq", "--dry-run", "--device", "H200", "--batch-sizes", "4,1")
    assert run(*arguments, "--context-len", "4096,1024", "--explain") == 0
    shown = capsys.readouterr().out
    rows = last_line(shown)["results"]
    cases = [(1, 1024), (4, 1024), (1, 4096), (4, 4096)]
    assert [(row["batch"], row["context_len"]) for row in rows[:4]] == cases
    qwen, machine = ModelShape.read(synthetic_config("qwen2.5-32b-awq")), find_machine("H200").sustained()
    floors = [Roofline(qwen, machine, torch.float16).seconds(Work.decode(*case)) * 1e3 for case in cases]
    assert [row["floor_ms"] for row in rows[:4]] == pytest.approx(floors)
    for batch, context_len in cases:
        assert f"decode {batch} at {context_len:,}" in shown, "the table tells them apart"
    for context_len in ("1,024", "4,096"):
        assert f"From batch 1 to 4 at {context_len} tokens of context what grows most is attention" in shown


def test_each_batch_is_measured_at_each_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.perf.profiling.measure_ceilings", lambda *_: Ceilings(1e12, 1e15, "float32", "a test"))
    arguments = ("--batch-sizes", "2,1", "--context-len", "40,2,20", "--steps", "1", "--repeats", "1")
    assert run("tiny", "--device", "cpu", *arguments, "--prefill-len", "8", "--trace", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "profile.json").read_text())["steps"]
    asked = [(1, 3), (2, 3), (1, 20), (2, 20), (1, 40), (2, 40), (1, 8)]
    assert [(row["batch"], row["context_len"]) for row in rows] == asked
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"decode 1 at 20", "decode 1 at 40", "prefill 8"} <= tracks
    assert "warning: --context-len 2: measured at 3, as half of the 5 steps" in capsys.readouterr().err


def test_batches_that_a_step_does_not_take_are_left_out_and_said() -> None:
    kept, warnings = measurable({"max_num_seqs": 4, "max_num_batched_tokens": 3}, [1, 3, 4, 8])
    assert kept == [1, 3]
    assert warnings == [
        "--batch-sizes 8: more than --max-num-seqs 4 lets into a step: not measured",
        "--batch-sizes 4: more than --max-num-batched-tokens 3 lets into a step: not measured",
    ]


def test_batches_that_do_not_fit_in_the_cache_are_left_out_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.perf.profiling.measure_ceilings", lambda *_: Ceilings(1e12, 1e15, "float32", "a test"))
    arguments = ("--batch-sizes", "1,8,2", "--context-len", "100", "--steps", "1", "--repeats", "1")
    assert run("tiny", "--device", "cpu", *arguments, "--kv-cache-memory-bytes", "1000000", "--prefill-len", "0") == 0
    shown = capsys.readouterr()
    assert [row["batch"] for row in last_line(shown.out)["results"]] == [1, 2]
    assert "warning: not measured: a batch of 8 with" in shown.err
    assert "does not fit in the KV cache of" in shown.err


@pytest.mark.slow
def test_a_measured_profile_accounts_for_all_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ("--batch-sizes", "1,3", "--context-len", "64", "--steps", "4", "--repeats", "2", "--prefill-len", "48")
    assert run("tiny", *arguments, "--device", "cpu", "--trace", "--explain", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert "of what the machine allows" in shown
    document = json.loads((out / "profile.json").read_text())
    decode, prefill = document["steps"][:2], document["steps"][2]
    assert [row["batch"] for row in decode] == [1, 3]
    assert prefill["tokens"] == 48
    for row in document["steps"]:
        assert sum(kind["measured_ms"] or 0.0 for kind in row["kinds"]) == pytest.approx(row["wall_ms"], rel=1e-3)
        measured = {part["part"] for part in row["parts"] if part["measured_ms"]}
        assert {"qkv", "o", "gate_up", "down", "lm_head", "attention", "sampling", "rotary"} <= measured
        assert abs(row["context_len"] - (64 if row["step"] == "decode" else 48)) <= 1
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"attention", "qkv"}
    assert document["machine"]["is_measured"]
    assert document["environment"]["cpu"]


@pytest.mark.parametrize(
    ("device", "positions", "step_tokens", "expected"),
    [("cpu", 2048, 512, 256), ("cuda", 32768, 8192, 2048), ("cuda", 1000, 8192, 999), ("cuda", 32768, 700, 700)],
)
def test_the_default_prefill_does_not_follow_the_context(
    device: str, positions: int, step_tokens: int, expected: int
) -> None:
    resolved = replace(
        located("tiny", None, {"device": "cpu"})[1],
        device=device,
        max_model_len=positions,
        max_num_batched_tokens=step_tokens,
    )
    options, prefill_len = profile_engine({}, resolved, [1, 4], [16], None, 11)
    assert prefill_len == expected
    assert options == {"max_num_seqs": 4, "max_num_batched_tokens": step_tokens, "max_model_len": expected + 1}


def test_the_longest_context_that_is_let_in_can_be_measured() -> None:
    """The engine's own check agrees with the one that comes before it."""
    _, resolved = located("tiny", None, {"device": "cpu", "max_model_len": 96})
    fits = []
    for context_len in range(60, 96):
        with suppress(ConfigError):
            profile_engine({"max_model_len": 96}, resolved, [3], [context_len], 0, steps_needed(1, 1))
            fits.append(context_len)
    with LLM("tiny", device="cpu", max_model_len=96, max_num_seqs=3, enable_prefix_caching=False) as llm:
        profiler = StepProfiler(llm, num_steps=1, repeats=1)
        assert profiler.decode(3, fits[-1]).work == Work.decode(3, fits[-1])
        with pytest.raises(ConfigError, match="max_model_len is 96"):
            profiler.decode(3, fits[-1] + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny", "--batch-sizes", "4", "--max-num-seqs", "2"],
            "--batch-sizes 4: more than --max-num-seqs 2",
        ),
        (
            ["tiny", "--batch-sizes", "4", "--max-num-batched-tokens", "2"],
            "--batch-sizes 4: more than --max-num-batched",
        ),
        (
            ["tiny", "--prefill-len", "99", "--max-num-batched-tokens", "88"],
            "--prefill-len 99: more than --max-num-batched",
        ),
        (["tiny", "--batch-sizes", "1", "--context-len", "99999"], "--context-len 99999: sequences grow to 1"),
        (["tiny", "--batch-sizes", "1", "--prefill-len", "99999"], "--prefill-len 99999: with the token that follows"),
        (["tiny", "--context-len", "50", "--max-model-len", "60"], "--context-len 50: sequences grow to"),
    ],
)
def test_what_cannot_be_measured_is_named_before_it_is(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("nybble.perf.profiling.measure_ceilings")
    assert run(*arguments, "--device", "cpu") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--dry-run"], "--dry-run needs a machine"),
        (["tiny", "--device", "H200"], "--dry-run takes other machines"),
        (["tiny", "--dry-run", "--device", "TPU"], "--device TPU: not in the table"),
        (["tiny", "--num-devices", "2"], "--num-devices: an engine runs on one device"),
        (["tiny", "--tflops", "5"], "--tflops describes a machine that is not here"),
        (["tiny", "--trace", "--dry-run", "--device", "H200"], "--trace shows what ran"),
        (["tiny", "--trace"], "--trace writes trace.json into the folder of --out"),
        (["tiny", "--dry-run", "--device", "H200", "--out", "/proc/version/x"], "--out /proc/version/x"),
        (
            ["tiny", "--dry-run", "--device", "H200", "--context-len", "5000"],
            "5000 tokens (--context-len, --prefill-len)",
        ),
        (["tiny", "--dry-run", "--device", "H200", "--max-num-seqs", "5"], "--max-num-seqs is a setting of an engine"),
        (["tiny", "--context-len", "1,9"], "--context-len 1,9: must be at least 2"),
        (["tiny", "--context-len", "9,x"], "--context-len 9,x: give whole numbers"),
        (["tiny", "--batch-sizes", "0"], "--batch-sizes 0: must be at least 1"),
        (["--dry-run", "--device", "H200"], "give a MODEL, or --synthetic"),
        (["--synthetic", "gpt-5", "--dry-run", "--device", "H200"], "--synthetic gpt-5: there are"),
        (
            [
                "tiny",
                "--dry-run",
                "--device",
                "A",
                "--memory-gb",
                "9",
                "--read-gb-s",
                "9",
                "--tflops",
                "9",
                "--num-devices",
                "2",
            ],
            "--num-devices 2: nothing is known of the link between several A; name the machine",
        ),
        (["tiny", "--dry-run", "--device", "H200", "--num-devices", "5"], "--num-devices 5: the model's"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*(arguments or ["--help"])) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_take_the_files_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("nybble.perf.profiling.dry_profile")
    (tmp_path / "profile.md").mkdir()
    assert run("tiny", "--dry-run", "--device", "H200", "--out", str(tmp_path)) == 2
    assert f"--out {tmp_path / 'profile.md'}: is a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_fit_in_kv_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--batch-sizes", "8", "--context-len", "200", "--kv-cache-memory-bytes", "2000000", "--device", "cpu")
    assert run("tiny", *arguments) == 2
    assert "does not fit in the KV cache" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_known_and_fill_the_step(tmp_path: Path) -> None:
    arguments = ("--synthetic", "qwen2.5-1.5b-awq", "--batch-sizes", "1,16", "--context-len", "512")
    assert run(*arguments, "--trace", "--out", str(tmp_path)) == 0
    document = json.loads((tmp_path / "profile.json").read_text())
    for row in document["steps"]:
        shares = {kind["kind"]: kind["share"] for kind in row["kinds"]}
        # Of the device's time: a short prefill of a small model mostly waits for the host.
        assert shares["weight GEMMs"] > 0.2 * (1 - shares["host gaps"])
        assert shares.get("other on the device", 0) < 0.25
        assert sum(shares.values()) == pytest.approx(1, abs=0.1)
