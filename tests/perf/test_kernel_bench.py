"""`nybble bench kernels`: the operations are those that a model binds; costs, shares and errors are what they say."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.cli import main
from nybble.kernels import int4_gated, int4_qkv
from nybble.kernels.op import Impl
from nybble.llm import LLM
from nybble.perf import kernel_bench, timing
from nybble.perf.ceilings import Ceilings
from nybble.perf.decode_ops import StepShape, decode_ops, step_shape
from nybble.perf.kernel_bench import KernelBench
from nybble.perf.located import located
from nybble.perf.step_cost import Work, parts_of

CEILINGS = Ceilings(read_bytes_per_second=1e9, flops_per_second=1e10, dtype="float32", how="for this test")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    monkeypatch.setattr("nybble.perf.ceilings.measure_ceilings", lambda device, dtype: CEILINGS)


def shape_of(synthetic: str) -> StepShape:
    return step_shape(*located(None, synthetic, {"device": "cpu"}))


def tiny() -> StepShape:
    return step_shape(*located("tiny", None, {"device": "cpu"}))


def test_the_operations_are_those_that_the_engine_binds() -> None:
    with LLM("tiny", device="cpu", kv_cache_memory_bytes=8_000_000) as llm:
        bound = llm.report.kernels
    shape = tiny()
    listed: dict[str, set[str]] = {}
    for op in decode_ops(shape, 2, 50):
        listed.setdefault(op.op, set()).add(shape.choose(op).name)
    assert {name: ", ".join(sorted(impls)) for name, impls in listed.items()} == bound


def test_operations_cost_what_the_roofline_says() -> None:
    """Two lists of a step's work: what is bound, and what the model defines. A cost apart: fused ones store less."""
    shape = tiny()
    listed = decode_ops(shape, 4, 100)
    parts = parts_of(shape.model, Work.decode(4, 100), torch.bfloat16)
    flops = sum(op.calls * op.cost(torch.bfloat16).flops for op in listed)
    assert flops == pytest.approx(sum(part.flops for part in parts), rel=0.01)
    products = [op for op in listed if op.op == "int4_linear" and op.name != "gate_up"]
    by_name = {part.name: part.num_bytes for part in parts}
    assert {op.name: op.calls * op.cost(torch.bfloat16).bytes for op in products} == {
        op.name: by_name[op.name] for op in products
    }


def test_fused_operations_stand_for_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [op.name for op in decode_ops(tiny(), 1, 9)]
    assert parts == ["norm", "qkv", "rotary", "kv_write", "attention", "o", "gate_up", "silu_mul", "down", "lm_head"]
    monkeypatch.setattr(StepShape, "is_fused", lambda self, op: True)
    ops = {op.name: op for op in decode_ops(tiny(), 1, 9)}
    assert list(ops) == ["norm", "qkv", "attention", "o", "gate_up", "down", "lm_head"]
    assert isinstance(ops["qkv"].case, int4_qkv.Case)
    assert isinstance(ops["gate_up"].case, int4_gated.Case)
    monkeypatch.undo()
    shape = tiny()
    model = replace(shape.model, config=replace(shape.model.config, qk_norm=True))
    normed = [op.name for op in decode_ops(replace(shape, model=model), 1, 9)]
    assert normed[1:5] == ["qkv", "q_norm", "k_norm", "rotary"]


def test_tensor_parallel_shapes() -> None:
    half = step_shape(*located(None, "qwen2.5-32b-awq", {"device": "cpu"}), 2)
    ops = {op.name: op.case for op in decode_ops(half, 3, 100)}
    assert (ops["qkv"].in_features, ops["qkv"].out_features) == (5120, 7168 // 2)
    assert (ops["o"].in_features, ops["o"].out_features) == (5120 // 2, 5120)
    assert (ops["gate_up"].in_features, ops["gate_up"].out_features) == (5120, 55296 // 2)
    assert (ops["down"].in_features, ops["down"].out_features) == (27648 // 2, 5120)
    assert ops["lm_head"].out_features == 152064 // 2
    assert (ops["attention"].query_heads, ops["attention"].kv_heads) == (20, 4)


def test_attention_is_split_for_the_longest_sequence() -> None:
    shape = replace(tiny(), max_model_len=700)
    case = next(op.case for op in decode_ops(shape, 2, 50) if op.op == "attention")
    assert case.seq_lens == (50, 50)
    assert max(case.seq_lens) + case.slack == 700


def test_shares_are_of_the_roofline() -> None:
    bench = KernelBench(tiny(), CEILINGS, 20)
    (point,) = bench.points([3], ["down"])
    (found,) = bench.time(point, repeats=1)
    cost = point.op.cost(torch.bfloat16)
    assert found["flops"] == cost.flops == 2 * 3 * 768 * 256
    assert found["bytes"] == cost.bytes > 768 * 256 // 2
    assert found["roofline_us"] == pytest.approx(max(cost.bytes / 1e9, cost.flops / 1e10) * 1e6)
    assert found["bound"] == ("math" if cost.flops > 10 * cost.bytes else "memory")
    assert found["share"] == pytest.approx(found["roofline_us"] / found["us"])
    assert found["tb_s"] == pytest.approx(cost.bytes / found["us"] / 1e6)
    assert found["num_copies"] == 2


def test_each_call_has_its_own_weights_and_the_same_activations() -> None:
    bench = KernelBench(tiny(), CEILINGS, 20)
    for name, shared, distinct in (("lm_head", [0], [1]), ("attention", [0, 4, 5], [1, 2])):
        (point,) = bench.points([2], [name])
        first, second = bench._calls(point)
        for index in shared:
            assert first.args[index] is second.args[index]  # type: ignore[attr-defined]
        for index in distinct:
            a, b = first.args[index], second.args[index]  # type: ignore[attr-defined]
            assert not torch.equal(a.nan_to_num(), b.nan_to_num())
            assert a.count_nonzero() > 0.9 * a.numel()
        assert first().isfinite().all()
        assert second().isfinite().all()


@pytest.mark.slow
def test_a_wrong_implementation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = KernelBench(tiny(), CEILINGS, 20)
    points = {point.op.name: point for point in bench.points([1], None)}
    assert all(bench.error(point) <= bench.tolerance for point in points.values())
    op = kernel_bench.OPS["silu_mul"]
    off = Impl(name="off", supports=lambda spec: None, launch=lambda x: op.reference.launch(x) * 1.1)
    monkeypatch.setitem(kernel_bench.OPS, "silu_mul", replace(op, impls=(off,)))
    wrong = replace(points["silu_mul"], impl=off)
    assert bench.error(wrong) == pytest.approx(0.1, rel=0.1)


def test_the_error_is_of_the_case_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that store a linear in groups of another size have an operation of the same name."""
    shape = tiny()
    others = tuple((replace(linear, group_size=64), count) for linear, count in shape.model.linears)
    assert not set(others) & set(shape.model.linears)
    model = replace(shape.model, linears=(*shape.model.linears, *others))
    found: list[Any] = []
    monkeypatch.setattr(kernel_bench, "measure", lambda op, impl, case, dtype, device: found.append(case) or 0.0)
    bench = KernelBench(replace(shape, model=model), CEILINGS, 20)
    points = list(bench.points([2, 9, 10], ["down"]))
    for point in points:
        bench.error(point)
    assert [case.tokens for case in found] == [2, 2, 4, 4], "few tokens, and once a shape"
    assert [case.group_size for case in found] == [point.op.case.group_size for point in points[:4]]
    assert found[0].group_size != found[1].group_size


def bench(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as end:
        main(["bench", "kernels", *more])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out.strip().splitlines(), said.err


def test_the_command_writes_a_table_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "k.json"
    flags = ["--device", "cpu", "--batch-sizes", "1,2", "--context-len", "9", "--repeats", "2", "-o", str(file)]
    code, lines, _ = bench(capsys, "tiny", *flags, "--csv", str(tmp_path / "k.csv"))
    assert code == 0
    last: dict[str, Any] = json.loads(lines[-1])
    document = json.loads(file.read_text())
    assert document["complete"]
    assert document["environment"]["cpu"]
    assert last["ceilings"]["read_bytes_per_second"] == 1e9
    assert [step["batch"] for step in last["steps"]] == [1, 2]
    for step in last["steps"]:
        rows = [row for row in last["results"] if row["batch"] == step["batch"]]
        assert len(rows) == 10
        assert step["ms"] == pytest.approx(sum(row["us"] * row["calls_per_step"] for row in rows) / 1e3)
    assert all(len(row["repeats"]) == 2 and row["error"] < 8e-3 for row in document["results"])
    assert any("int4_linear=" in line and "gate_up" in line for line in lines)
    assert len((tmp_path / "k.csv").read_text().splitlines()) == 1 + 20


def test_chosen_operations_and_no_check(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--batch-sizes", "1", "--context-len", "9", "--repeats", "1", "--no-check"]
    code, lines, said = bench(capsys, "tiny", *flags, "--ops", "down,silu_mul", "--all-impls", "--dtype", "bfloat16")
    assert code == 0
    assert "down × 1: int4_linear" in said  # at 1 GB/s the roofline is far above what any machine takes
    assert "above the ceilings" in said
    rows = json.loads(lines[-1])["results"]
    assert {row["name"] for row in rows} == {"down", "silu_mul"}
    assert sum(row["is_chosen"] for row in rows) == 2
    assert all(row["error"] is None for row in rows)
    assert json.loads(lines[-1])["steps"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tiny", "--synthetic", "qwen2.5-7b-awq"], "give a MODEL, or --synthetic"),
        (["--synthetic", "gpt"], "there are qwen2.5-0.5b-awq"),
        (["tiny", "--batch-sizes", "0"], "at least 1"),
        (["tiny", "--ops", "gate"], "--ops gate: a step of this model has norm, qkv"),
        (["tiny", "--num-devices", "3"], "--num-devices 3: the model's 4 attention heads"),
        (["tiny", "--context-len", "5000"], "--context-len 5000"),
        (["tiny", "--kernels", "int4_linear=fast"], "has no implementation 'fast'"),
        (["tiny", "-o", "no/such/file.json"], "no/such is no directory"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    code, _, said = bench(capsys, *flags)
    assert code == 2
    assert message in said


@pytest.fixture
def gpu_shape() -> Iterator[StepShape]:
    yield step_shape(*located(None, "qwen2.5-0.5b-awq", {"device": "cuda"}))
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_every_implementation_on_a_gpu(gpu_shape: StepShape, batch: int) -> None:
    bench = KernelBench(gpu_shape, CEILINGS, 300)
    for point in bench.points([batch], all_impls=True):
        found = bench.time(point, repeats=3)
        assert all(0.2 < repeat["us"] < 20_000 for repeat in found), (point.label, found)
        assert bench.error(point) <= bench.tolerance, point.label
