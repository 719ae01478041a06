"""`nybble advise`: settings for a model, a machine and a load, each with its reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import make_console, show_rows_of
from nybble.commands.profile import (
    LinkFlag,
    MemoryGbFlag,
    NumDevicesFlag,
    ReadFlag,
    TflopsFlag,
    read_shape,
)
from nybble.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from nybble.perf.advice import Advice
    from nybble.perf.machines import Machine
    from nybble.perf.refine import Tried
    from nybble.perf.setting import Setting
    from nybble.perf.workload_model import Load, Outcome

LOAD, MACHINE = "Load", "Machine"
HERE = ("auto", "cpu", "cuda")


def advise(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    device: Annotated[
        str,
        typer.Option(help='A machine: H200, "RTX 3090" …; or auto, cpu, cuda: this one.', rich_help_panel=MACHINE),
    ] = "auto",
    num_devices: NumDevicesFlag = 1,
    memory_gb: MemoryGbFlag = None,
    read_gb_s: ReadFlag = None,
    tflops: TflopsFlag = None,
    link_gb_s: LinkFlag = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests at once.", rich_help_panel=LOAD, show_default=False, min=1)
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Requests a second.", rich_help_panel=LOAD, show_default=False)
    ] = None,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.", rich_help_panel=LOAD, min=1)] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.", rich_help_panel=LOAD, min=1)] = 128,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="Objective in ms: ttft:200 or tpot:50; may be repeated.", rich_help_panel=LOAD, show_default=False
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Hold the settings against their neighbours in short runs here.",
            rich_help_panel="Measuring",
        ),
    ] = False,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            help="Requests a run; default: three for each stream, at least 12.",
            rich_help_panel="Measuring",
            show_default=False,
            min=1,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Of each run.", rich_help_panel="Measuring", min=1)] = 2,
    output: flags.OutputFlag = None,
) -> None:
    """The settings that matter for a load: devices, sequences and tokens a step, KV memory and its type, and why.

    From the roofline and a model of memory; with --measure refined by short runs on this machine. The last line of
    standard output is JSON.
    """
    flags.check_model(model, synthetic)
    described = {"--memory-gb": memory_gb, "--read-gb-s": read_gb_s, "--tflops": tflops, "--link-gb-s": link_gb_s}
    given = [flag for flag, value in described.items() if value is not None]
    if device in HERE and given:
        raise ConfigError(f"{given[0]} describes a machine that is not here: it goes with --device NAME")
    if measure and device not in HERE:
        raise ConfigError(f"--measure runs on this machine: it goes with --device auto, cpu or cuda, not {device}")
    from nybble.commands.imports import ctrl_c_exits

    with ctrl_c_exits():
        import torch

        from nybble.perf.advice import advise as find_advice
        from nybble.perf.machines import describe
        from nybble.perf.profiling import device_here, this_machine
    load = _load(concurrency, request_rate, input_len, output_len, goodput)
    shape = read_shape(model, synthetic)
    where = device_here(device) if device in HERE else "cuda"
    if where == "cpu" and num_devices > 1:
        raise ConfigError(f"--num-devices {num_devices}: this machine's CPU is one device; name a GPU with --device")
    if device in HERE:
        machine = this_machine(where, torch.bfloat16 if where == "cpu" else torch.float16)
    else:
        machine = describe(device, memory_gb=memory_gb, read_gb_s=read_gb_s, tflops=tflops, link_gb_s=link_gb_s)
    advice = find_advice(shape, machine, load, num_devices, on_gpu=where == "cuda")
    settings, tried = advice.settings, []
    console = make_console()
    if measure:
        settings, tried = _refine(model, synthetic, where, advice, load, num_prompts, repeats)
    _show(advice, settings, tried, machine, load, model, synthetic, console, where == "cuda")
    document = _document(advice, settings, tried, machine, load, model or synthetic)
    if output is not None:
        _write(document, output)
    last = {"benchmark": "advise", "settings": {s.name: s.value for s in settings}, "notes": advice.notes}
    last |= {name: document[name] for name in ("expected", "measured")}
    print(json.dumps({**last, "output": None if output is None else str(output)}, ensure_ascii=False), flush=True)


def _load(
    concurrency: int | None, request_rate: float | None, input_len: int, output_len: int, goodput: list[str] | None
) -> Load:
    from nybble.perf.workload_model import Load

    if (concurrency is None) == (request_rate is None):
        raise ConfigError("give a load: --concurrency, or --request-rate")
    if request_rate is not None and not 0 < request_rate < 1e6:
        raise ConfigError(f"--request-rate {request_rate:g}: must be above 0")
    objectives = flags.parse_objectives(goodput or [])
    if "e2el" in objectives:
        raise ConfigError("--goodput e2el: advise knows ttft and tpot; e2el is ttft + tpot × (output tokens − 1)")
    return Load(
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        request_rate=request_rate,
        ttft_ms=objectives.get("ttft"),
        tpot_ms=objectives.get("tpot"),
    )


def _refine(
    model: str | None,
    synthetic: str | None,
    where: str,
    advice: Advice,
    load: Load,
    num_prompts: int | None,
    repeats: int,
) -> tuple[list[Setting], list[Tried]]:
    from nybble.perf.refine import MOST_TRIED, refine
    from nybble.progress import Progress

    num_requests = num_prompts or max(3 * (load.concurrency or advice.value("max_num_seqs")), 12)
    with Progress(MOST_TRIED, flags.is_terminal()) as bar:

        def report(tried: Tried) -> None:
            bar.advance(num_requests * repeats * load.output_len, 1, f"{tried.output_tok_s:,.0f} tok/s")

        engine = {"device": where, "enable_prefix_caching": False}
        return refine(model, synthetic, engine, advice, load, num_requests=num_requests, repeats=repeats, report=report)


def _tried_words(tried: Tried, load: Load) -> str:
    trial = tried.trials[-1]
    names = ("max_num_seqs", "max_num_batched_tokens")
    settings = ", ".join(f"{name} {tried.settings[name]}" for name in names)
    kept = (
        ""
        if load.ttft_ms is None and load.tpot_ms is None
        else f", {'keeps' if tried.keeps(load) else 'does not keep'} the objectives"
    )
    return (
        f"tried {settings}: {tried.output_tok_s:,.1f} tok/s, "
        f"TTFT {trial.ttft_ms:.1f} ms (90 %: {trial.ttft_p90_ms:.1f}), "
        f"TPOT {trial.tpot_ms:.2f} ms (90 %: {trial.tpot_p90_ms:.2f}){kept}; {tried.verdict}"
    )


def _measured_words(measured: dict[str, float], expected: Outcome, load: Load) -> str:
    """How far the model is off."""
    text = (
        f"measured with these settings: {measured['output_tok_s']:,.1f} tok/s, TTFT {measured['ttft_ms']:.1f} ms, "
        f"TPOT {measured['tpot_ms']:.2f} ms"
    )
    if load.request_rate is not None:
        return (
            f"{text}; {measured['requests_per_second']:.3g} requests a second, the last ones' end included, of the "
            f"{load.request_rate:g} that came"
        )
    share = measured["output_tok_s"] / expected.output_tok_s
    return f"{text}; {share:.2f} of the tok/s expected: take the other rows for no more certain"


def _show(
    advice: Advice,
    settings: list[Setting],
    tried: list[Tried],
    machine: Machine,
    load: Load,
    model: str | None,
    synthetic: str | None,
    console: Console,
    on_gpu: bool,
) -> None:
    from nybble.perf.setting import serve_command
    from nybble.perf.workload_model import CPU_FACTOR

    what = f"{load.concurrency} at once" if load.concurrency else f"{load.request_rate:g} requests a second"
    devices = f"{advice.num_devices} × " if advice.num_devices > 1 else ""
    console.print(
        f"{model or synthetic} on {devices}{machine.name}: {what}, {load.input_len} + {load.output_len} tokens\n",
        soft_wrap=True,
    )
    for setting in settings:
        console.print(f"{setting.name}  [bold]{setting.value}[/]\n    {setting.why}", soft_wrap=True)
    console.print()
    num_seqs = next(setting.value for setting in settings if setting.name == "max_num_seqs")
    show_rows_of(_by_seqs(advice, num_seqs), console)
    if on_gpu:
        words = (
            "limit: the roofline; expected: as nybble came to it on an H100 (reading, computing and launches in turn)"
        )
    else:
        words = (
            "limit: the roofline, which a CPU stays far below; expected: from this CPU's rates as measured now, on the "
            f"CPU that it was set by within a factor of {CPU_FACTOR:g}; --measure says how far off it is here"
        )
    console.print(f"[dim]{words}[/]\n")
    for note in advice.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for each in tried:
        console.print(_tried_words(each, load), soft_wrap=True)
    if tried:
        measured = _measured(settings, tried, load)
        console.print(_measured_words(measured, advice.of(num_seqs)[0], load), soft_wrap=True)
    console.print(serve_command(model or "MODEL", settings, on_gpu=on_gpu), soft_wrap=True, markup=False)


def _measured(settings: list[Setting], tried: list[Tried], load: Load) -> dict[str, float]:
    """Medians of the repeats with the settings that were chosen."""
    from statistics import median

    from nybble.perf.refine import chosen

    trials = chosen(settings, tried).trials
    found = {name: median(getattr(t, name) for t in trials) for name in ("output_tok_s", "tpot_ms", "ttft_ms")}
    return {**found, "requests_per_second": found["output_tok_s"] / load.output_len}


def _by_seqs(advice: Advice, recommended: int) -> list[list[str]]:
    """Other numbers of sequences at once; the first row is the head."""
    rows = [["at once", "limit tok/s", "expected tok/s", "TPOT ms", "TTFT ms", "KV memory", ""]]
    for outcome, limit, fits in advice.by_seqs:
        rows.append(
            [
                str(outcome.num_seqs),
                f"{limit.output_tok_s:,.0f}",
                f"{outcome.output_tok_s:,.0f}",
                f"{outcome.tpot_ms:.1f}",
                f"{outcome.ttft_ms:.0f}",
                "fits" if fits else "too small",
                "← recommended" if outcome.num_seqs == recommended else "",
            ]
        )
    return rows


def _document(
    advice: Advice, settings: list[Setting], tried: list[Tried], machine: Machine, load: Load, model: str | None
) -> dict[str, Any]:
    from nybble.bench.environment import environment

    expected, limit = advice.of(next(setting.value for setting in settings if setting.name == "max_num_seqs"))

    def told(outcome: Outcome) -> dict[str, float]:
        return {
            name: getattr(outcome, name)
            for name in ("num_seqs", "output_tok_s", "requests_per_second", "tpot_ms", "ttft_ms")
        }

    return {
        "benchmark": "advise",
        "environment": environment(),
        "model": model,
        "machine": asdict(machine),
        "load": asdict(load),
        "num_devices": advice.num_devices,
        "settings": [asdict(setting) for setting in settings],
        "expected": told(expected),
        "limit": told(limit),
        "measured": _measured(settings, tried, load) if tried else None,
        "memory": {**asdict(advice.memory), "most_kv_tokens": advice.memory.most_kv_tokens},
        "by_seqs": [{"expected": told(o), "limit": told(limit), "fits": fits} for o, limit, fits in advice.by_seqs],
        "tried": [asdict(each) for each in tried],
        "notes": advice.notes,
    }


def _write(document: dict[str, Any], output: Path) -> None:
    try:
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
