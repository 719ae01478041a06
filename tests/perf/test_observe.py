"""Who is to blame for which time, and what the observers see."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble import kernels
from nybble.llm import LLM
from nybble.perf.intervals import Interval, blame_nested, blame_queued, write_trace
from nybble.perf.observe import KIND_OF_OP, CpuObserver, kernel_intervals, kernel_part
from nybble.perf.step_cost import Kind

GEMM: Kind = "weight GEMMs"


def test_a_waiting_kernel_is_not_blamed_for_the_one_before() -> None:
    intervals = [
        Interval(0, 10, "a", GEMM),
        Interval(4, 12, "b", GEMM),
        Interval(5, 9, "c", GEMM),
        Interval(20, 21, "d", GEMM),
    ]
    assert [blame.seconds for blame in blame_queued(intervals)] == [10, 2, 0, 1]


def test_a_call_is_not_blamed_for_what_it_calls() -> None:
    outer, inner, innermost = Interval(0, 10, "o", GEMM), Interval(1, 4, "i", GEMM), Interval(2, 3, "m", GEMM)
    next_inner, later = Interval(4, 6, "n", GEMM), Interval(10, 11, "l", GEMM)
    blamed = {b.interval.part: b.seconds for b in blame_nested([later, innermost, next_inner, inner, outer])}
    assert blamed == {"o": 5, "i": 2, "m": 1, "n": 2, "l": 1}


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("w4a16", "int4", GEMM),
        ("dequantize", "dequantize", "dequantization"),
        ("nvjet_sm90_hsh_128x256_64x4_2x1_v_bz_coopB_TNT", "dense", GEMM),
        ("decode_kernel", "attention", "attention"),
        ("join_kernel", "attention", "attention"),
        ("kv_write_kernel", "kv_write", "KV writes"),
        ("rms_norm_kernel", "rms_norm", "norms and activations"),
        ("ncclDevKernel_AllReduce_Sum_f16_RING_LL", "all_reduce", "communication"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps",
            "sampling",
            "sampling",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add",
            "copies and small kernels",
            "other on the device",
        ),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, part: str, kind: Kind) -> None:
    assert kernel_part(name) == (part, kind)


def test_int4_kernels_get_their_linears_names_where_the_count_fits() -> None:
    def events(count: int) -> list[dict[str, object]]:
        return [{"ph": "X", "cat": "kernel", "name": "w4a16", "ts": 10 * i, "dur": 5.0} for i in range(count)] + [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 1},
            {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": -5, "dur": 1},
        ]

    found = kernel_intervals(events(4), ("qkv", "o"), num_layers=2)
    assert [interval.part for interval in found] == ["copies and small kernels", "qkv", "o", "qkv", "o"]
    assert found[1].end - found[1].begin == pytest.approx(5e-6)
    others = kernel_intervals(events(8), ("qkv", "o"), num_layers=2)  # two launches each
    assert {interval.part for interval in others} == {"copies and small kernels", "int4"}


def test_a_trace_is_chromes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, {"decode 1": [Interval(3.0, 3.5, "qkv", GEMM)], "prefill": [Interval(3.1, 3.2, "o", GEMM)]})
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["decode 1", "prefill"]
    assert [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        ("qkv", 0.0, 500_000.0),
        ("o", pytest.approx(100_000.0), pytest.approx(100_000.0)),
    ]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=4, max_model_len=256, enable_prefix_caching=False) as made:
        yield made


def test_timers_see_every_operation_and_leave_nothing_behind(llm: LLM) -> None:
    model, runner = llm.runner.model, llm.runner
    before = {path: dict(vars(module)) for path, module in model.named_modules()}  # type: ignore[attr-defined]
    prompt = [1, 2, 3]
    expected = llm.generate(prompt)[0].outputs[0].token_ids
    observer = CpuObserver(model, runner)  # type: ignore[arg-type]
    with observer.watching():
        assert llm.generate(prompt)[0].outputs[0].token_ids == expected
    seen = {interval.part for interval in observer.intervals()}
    operations = {op for op in llm.report.kernels if KIND_OF_OP[op] != GEMM}
    assert operations | {"qkv", "o", "gate_up", "down", "lm_head", "sampling", "step"} <= seen
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before  # type: ignore[attr-defined]
    assert "submit" not in vars(runner)


def test_blamed_time_adds_up_to_the_steps(llm: LLM) -> None:
    observer = CpuObserver(llm.runner.model, llm.runner)  # type: ignore[arg-type]
    with observer.watching():
        llm.generate([5, 6, 7])
    steps = sum(i.end - i.begin for i in observer.intervals() if i.part == "step")
    assert sum(blame.seconds for blame in observer.blamed(1)) == pytest.approx(steps, rel=1e-6)


def test_every_kernel_of_ours_has_a_kind() -> None:
    folder = Path(kernels.__file__).parent
    sources = [*folder.glob("cuda/*.cu"), *folder.glob("triton/*.py")]
    text = "\n".join(source.read_text("utf-8") for source in sources)
    entry = r'extern "C" __global__[^;{]*?(\w+)\s*\(const [^)]*Arguments args\)|@triton\.jit[^\n]*\ndef (\w+_kernel)\('
    names = {first or second for first, second in re.findall(entry, text)}
    assert {"w4a16", "attention_decode", "dequantize", "rms_norm_kernel"} <= names, names
    for name in names - {"read_kernel"}:  # of the ceilings
        assert kernel_part(name)[1] != "other on the device", name
