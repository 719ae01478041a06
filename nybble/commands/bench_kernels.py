"""`nybble bench kernels`: each operation of a decode step on its own, against the machine's ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import last_line, make_console, show_ceilings, show_formulas, warn
from nybble.commands.options import with_flags
from nybble.core.config import EngineConfig
from nybble.core.errors import ConfigError

if TYPE_CHECKING:
    from nybble.bench.results import ResultsFile
    from nybble.perf.decode_ops import StepShape
    from nybble.perf.kernel_bench import KernelBench, Point

DEFAULT_SHAPE = "qwen2.5-32b-awq"
ABOVE_NOISE = 1.2  # activations that the cache has, and a ceiling's own spread, explain a share up to here
ENGINE_FLAGS = ("revision", "download_dir", "device", "dtype", "max_model_len", "block_size", "kernels")
FORMULAS = {
    "µs": "time of a call among others like it, each with its own weights, so that caches are cold; on a GPU the "
    "marginal time inside a CUDA graph",
    "TB/s, TFLOP/s": "bytes and operations that it cannot do without / that time",
    "roofline": "max(bytes / read ceiling, operations / math ceiling); share = roofline / time; activations are in the "
    "cache, so what touches nothing else may be above 100 %",
    "error": "‖result − float64 reference‖ / ‖reference‖; on a CPU with at most 4 tokens",
    "a row": "median of the repeats, each number by itself",
}
FIELDS = (
    "name",
    "op",
    "impl",
    "is_chosen",
    "batch",
    "us",
    "tb_s",
    "tflop_s",
    "roofline_us",
    "share",
    "bound",
    "error",
    "calls_per_step",
)

COLUMNS = (
    "batch",
    "part",
    "kernel",
    "µs",
    "least–most",
    "TB/s",
    "TFLOP/s",
    "roofline µs",
    "share",
    "bound",
    "error",
    "a step",
)


@with_flags(without=[field.name for field in fields(EngineConfig) if field.name not in ENGINE_FLAGS])
def kernels(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Sequences that decode together, e.g. 1,16,64.")
    ] = "1,4,8,16,32,64,128",
    context_len: Annotated[int, typer.Option(help="Tokens that each attends to.", min=1)] = 1024,
    ops: Annotated[
        str | None,
        typer.Option(help="Only these, by place or kind, e.g. gate_up,int4_linear.", show_default=False),
    ] = None,
    num_devices: Annotated[int, typer.Option(help="Shapes of one of so many devices, tensor parallel.", min=1)] = 1,
    all_impls: Annotated[bool, typer.Option("--all-impls", help="Every implementation that runs here.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Leave the errors out.")] = False,
    repeats: flags.RepeatsFlag = 5,
    output: flags.OutputFlag = None,
    csv: flags.CsvFlag = None,
    *,
    engine: dict[str, Any],
) -> None:
    """How long each operation of a decode step takes, how near the machine's ceilings it is, and how exact.

    Without MODEL: the shapes of qwen2.5-32b-awq. No weights are read. The ceilings are measured in the same run. The
    last line of standard output is JSON. Exit code 1 if an implementation computes something else than its reference.
    """
    from nybble.commands.imports import ctrl_c_exits

    with ctrl_c_exits():
        from nybble.perf.kernel_bench import KernelBench
    from nybble.bench.results import ResultsFile
    from nybble.perf.ceilings import measure_ceilings
    from nybble.perf.decode_ops import step_shape
    from nybble.perf.located import located

    if model is None and synthetic is None:
        synthetic = DEFAULT_SHAPE
    flags.check_model(model, synthetic)
    flags.check_repeats(repeats)
    batches = flags.parse_counts("--batch-sizes", batch_sizes)
    shape = step_shape(*located(model, synthetic, engine), num_devices)
    if context_len > shape.max_model_len:
        raise ConfigError(f"--context-len {context_len}: the model is made for {shape.max_model_len} (max_model_len)")
    names = _names(ops, shape)
    settings = {
        "model": model or synthetic,
        "context_len": context_len,
        "num_devices": num_devices,
        "device": str(shape.device),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "engine": engine,
    }
    results = ResultsFile("kernels", output, settings, formulas=FORMULAS)
    results.write()
    ceilings = measure_ceilings(shape.device, shape.dtype)
    results.facts = {"ceilings": asdict(ceilings)}
    console = make_console()
    bench = KernelBench(shape, ceilings, context_len)
    points = list(bench.points(batches, names, all_impls))
    _measure(bench, points, repeats, not no_check, results)
    rows = results.rows()
    results.facts["steps"] = steps = _steps(rows, batches) if names is None else []
    results.is_complete = True
    results.write()
    if csv is not None:
        results.write_csv(csv)
    _show(rows, bench.tolerance, console)
    show_ceilings(ceilings, console)
    _show_steps(steps, console)
    show_formulas(FORMULAS, console)
    summary = {"ceilings": asdict(ceilings), "steps": steps, "output": None if output is None else str(output)}
    last_line(results.document(), FIELDS, **summary)
    if above := [row["label"] for row in rows if "int4" in row["op"] and row["share"] > ABOVE_NOISE]:
        warn(f"{', '.join(above)}: above the ceilings; other programs ran while those were measured, so repeat it")
    wrong = [row["label"] for row in rows if row["error"] is not None and not row["error"] <= bench.tolerance]
    if wrong:
        flags.fail(f"{', '.join(wrong)}: further from the reference than rounding explains ({bench.tolerance:g})")


def _measure(bench: KernelBench, points: Sequence[Point], repeats: int, check: bool, results: ResultsFile) -> None:
    from nybble.progress import Progress

    with Progress(len(points), flags.is_terminal()) as bar:
        for point in points:
            bar.advance(0, 0, point.label)
            found = bench.time(point, repeats)
            error = bench.error(point) if check else None
            place = {"name": point.op.name, "op": point.op.op, "impl": point.impl.name, "is_chosen": point.is_chosen}
            for repeat in found:
                results.add(point.label, asdict(point.op), {**place, "batch": point.batch, **repeat, "error": error})
            bar.advance(0, 1, point.label)


def _names(ops: str | None, shape: StepShape) -> list[str] | None:
    from nybble.perf.kernel_bench import names_of

    if ops is None:
        return None
    names, known = ops.split(","), names_of(shape)
    for name in names:
        if name not in known:
            raise ConfigError(f"--ops {name}: a step of this model has {', '.join(known)}")
    return names


def _steps(rows: Sequence[Mapping[str, Any]], batches: Sequence[int]) -> list[dict[str, Any]]:
    """The chosen implementations of a whole step, added up."""
    steps = []
    for batch in batches:
        chosen = [row for row in rows if row["batch"] == batch and row["is_chosen"]]
        total, roofline = (sum(row[name] * row["calls_per_step"] for row in chosen) for name in ("us", "roofline_us"))
        steps.append({"batch": batch, "ms": total / 1e3, "roofline_ms": roofline / 1e3, "share": roofline / total})
    return steps


def _show(rows: Sequence[Mapping[str, Any]], tolerance: float, console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in ("part", "kernel", "bound") else "right", no_wrap=True)
    for row in rows:
        least, most = row["spread"]["us"]
        table.add_row(
            str(row["batch"]),
            row["name"],
            f"{row['op']}={row['impl']}" + ("" if row["is_chosen"] else " [dim](not chosen)[/]"),
            f"{row['us']:,.1f}",
            f"{least:,.1f}–{most:,.1f}",
            f"{row['tb_s']:.4f}",
            f"{row['tflop_s']:,.3f}",
            f"{row['roofline_us']:,.2f}",
            f"{row['share']:.0%}",
            row["bound"],
            "–" if row["error"] is None else f"{row['error']:.1e}" + ("" if row["error"] <= tolerance else " WRONG"),
            f"× {row['calls_per_step']}",
        )
    console.print(table)


def _show_steps(steps: Sequence[Mapping[str, Any]], console: Any) -> None:
    for step in steps:
        console.print(
            f"a step of {step['batch']}, its operations added up: {step['ms']:,.2f} ms; roofline "
            f"{step['roofline_ms']:,.2f} ms, {step['share']:.0%}"
        )
