"""`nybble profile`: where a step's time goes, against the roofline; measured, or for a machine that is not here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import make_console, show_formulas, show_rows_of, warn
from nybble.commands.options import with_flags
from nybble.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from nybble.perf.machines import Machine
    from nybble.perf.model_shape import ModelShape

STEPS, MACHINE = "Steps", "Machine"

MachineFlag = Annotated[
    str,
    typer.Option(
        "--device",
        help='Where to run: auto, cpu or cuda; with --dry-run a machine: H200, "RTX 3090" …',
        rich_help_panel=MACHINE,
    ),
]
NumDevicesFlag = Annotated[
    int,
    typer.Option(
        "--num-devices", help="Equal machines, tensor parallel; dry run only.", rich_help_panel=MACHINE, min=1
    ),
]
MemoryGbFlag = Annotated[
    float | None,
    typer.Option("--memory-gb", help="Of a machine not in the table.", rich_help_panel=MACHINE, show_default=False),
]
ReadFlag = Annotated[
    float | None,
    typer.Option("--read-gb-s", help="Its memory bandwidth.", rich_help_panel=MACHINE, show_default=False),
]
TflopsFlag = Annotated[
    float | None,
    typer.Option("--tflops", help="Its dense 16-bit rate.", rich_help_panel=MACHINE, show_default=False),
]
LinkFlag = Annotated[
    float | None,
    typer.Option("--link-gb-s", help="Between devices, one way.", rich_help_panel=MACHINE, show_default=False),
]


@with_flags(without=("device", "enable_prefix_caching"))
def profile(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Sequences in a decode step, e.g. 1,4,16.", rich_help_panel=STEPS)
    ] = "1,4,16",
    context_len: Annotated[
        str, typer.Option(help="Tokens each of them sees, e.g. 1024,4096: each batch at each.", rich_help_panel=STEPS)
    ] = "1024",
    prefill_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prefill step; 0: none. Default: 2048, on a CPU 256.",
            rich_help_panel=STEPS,
            show_default=False,
            min=0,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of each repeat.", rich_help_panel=STEPS, min=1)] = 8,
    repeats: flags.RepeatsFlag = 3,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="The roofline alone: needs neither GPU nor weights.", rich_help_panel=MACHINE),
    ] = False,
    device: MachineFlag = "auto",
    num_devices: NumDevicesFlag = 1,
    memory_gb: MemoryGbFlag = None,
    read_gb_s: ReadFlag = None,
    tflops: TflopsFlag = None,
    link_gb_s: LinkFlag = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say in words what the numbers mean.", rich_help_panel=flags.OUTPUT)
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Write trace.json, for chrome://tracing or Perfetto.", rich_help_panel=flags.OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for profile.json and profile.md.", rich_help_panel=flags.OUTPUT, show_default=False),
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Where a step's time goes, by batch size and context: weight products, dequantization, attention, norms,
    sampling, KV writes, communication, the host; each against its roofline, whose ceilings are measured in the
    same run.

    With --dry-run the roofline alone, for any model's config.json on any machine of a small table. The last line of
    standard output is JSON.
    """
    batches = sorted(flags.parse_counts("--batch-sizes", batch_sizes))
    context_lens = sorted(flags.parse_counts("--context-len", context_len))
    if context_lens[0] < 2:
        raise ConfigError(f"--context-len {context_len}: must be at least 2, the new token and one that it sees")
    flags.check_model(model, synthetic)
    flags.check_repeats(repeats)
    described = {"--memory-gb": memory_gb, "--read-gb-s": read_gb_s, "--tflops": tflops, "--link-gb-s": link_gb_s}
    _check(dry_run, device, num_devices, described)
    if trace and dry_run:
        raise ConfigError("--trace shows what ran, and with --dry-run nothing does")
    if trace and out is None:
        raise ConfigError("--trace writes trace.json into the folder of --out: give one")
    if out is not None:
        _make_folder(out, ("profile.json", "profile.md", *(["trace.json"] if trace else [])))
    console = make_console()
    settings = {
        "model": model or synthetic,
        "batch_sizes": batches,
        "context_len": context_lens[-1],  # what is said of larger batches is said of it
        "context_lens": context_lens,
        "dry_run": dry_run,
        "device": device,
        "num_devices": num_devices,
        "engine": engine,
    }
    from nybble.commands.imports import ctrl_c_exits

    with ctrl_c_exits():
        from nybble.perf.profiling import dry_profile, measured_profile
    if dry_run:
        from nybble.perf.machines import describe

        machine: Machine = describe(
            device, memory_gb=memory_gb, read_gb_s=read_gb_s, tflops=tflops, link_gb_s=link_gb_s
        )
        if unused := set(engine) - {"revision", "download_dir"}:
            name = min(unused).replace("_", "-")
            raise ConfigError(f"--{name} is a setting of an engine, and --dry-run makes none")
        shape = read_shape(model, synthetic, **engine)
        document = dry_profile(shape, machine, num_devices, batches, context_lens, prefill_len, settings)
    else:
        engine = {**engine, "device": device, "enable_prefix_caching": False}
        document = measured_profile(
            model,
            synthetic,
            engine,
            batches,
            context_lens,
            prefill_len,
            num_steps=steps,
            repeats=repeats,
            settings=settings,
            trace=out / "trace.json" if trace and out is not None else None,
            show_bar=flags.is_terminal(),
        )
    _show(document, console, explain)
    for warning in document["warnings"]:
        warn(warning)
    if any((row["of_floor"] or 0) > 1.05 for row in document["steps"]):
        warn("a step was faster than its floor: the machine was busy while its ceilings were measured; run it again")
    if out is not None:
        _write(document, out)
    summary = ("step", "batch", "context_len", "wall_ms", "floor_ms", "of_floor", "tok_s", "limit_tok_s", "bound")
    results = [{name: row[name] for name in summary} for row in document["steps"]]
    last = {"benchmark": "profile", "complete": True, "results": results, "out": None if out is None else str(out)}
    print(json.dumps(last, ensure_ascii=False), flush=True)


def read_shape(model: str | None, synthetic: str | None, **where: str) -> ModelShape:
    """From a model's config.json, or that of a known shape."""
    from nybble.bench.synthetic import synthetic_config
    from nybble.perf.model_shape import ModelShape, read_model

    if synthetic is not None:
        return ModelShape.read(synthetic_config(synthetic))
    assert model is not None
    return read_model(model, **where)


def _make_folder(out: Path, names: Sequence[str]) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: it cannot be made, or these files cannot be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    for name in names:
        flags.check_writable("--out", out / name)


def _check(dry_run: bool, device: str, num_devices: int, described: dict[str, float | None]) -> None:
    is_here = device in ("auto", "cpu", "cuda")
    if dry_run and is_here:
        raise ConfigError('--dry-run needs a machine: --device H200, --device "RTX 3090" …')
    if not dry_run and not is_here:
        raise ConfigError(f"--device {device}: steps are measured on auto, cpu or cuda; --dry-run takes other machines")
    if not dry_run and num_devices > 1:
        raise ConfigError("--num-devices: an engine runs on one device; --dry-run draws the roofline of several")
    given = [flag for flag, value in described.items() if value is not None]
    if given and not dry_run:
        raise ConfigError(f"{given[0]} describes a machine that is not here: it goes with --dry-run")


def _show(document: dict[str, Any], console: Console, with_words: bool) -> None:
    from nybble.perf.explain import explain
    from nybble.perf.profile_report import kinds_table, steps_table

    machine = document["machine"]
    devices = f"{document['num_devices']} × " if document["num_devices"] > 1 else ""
    console.print(
        f"{devices}{machine['name']}: reads {machine['read_bytes_per_second'] / 1e9:,.0f} GB/s, computes "
        f"{machine['flops_per_second'] / 1e12:,.3g} TFLOP/s "
        f"({'measured now' if machine['is_measured'] else 'what programs reach of the data sheet'})\n",
        soft_wrap=True,
    )
    show_rows_of(steps_table(document), console)
    console.print()
    show_rows_of(kinds_table(document), console)
    if with_words:
        from rich.markdown import Markdown

        console.print()
        console.print(Markdown(explain(document)))
    show_formulas(document["formulas"], console)


def _write(document: dict[str, Any], out: Path) -> None:
    from nybble.perf.profile_report import markdown

    try:
        (out / "profile.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (out / "profile.md").write_text(markdown(document), "utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
