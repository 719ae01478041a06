"""`nybble compare`: the same load on several engines, and a report."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_progress import PartTeller
from nybble.commands.bench_tables import make_console, show_rows_of, warn
from nybble.core.errors import ConfigError

if TYPE_CHECKING:
    from nybble.compare.comparison import Asked
    from nybble.compare.memory_sweep import Cell

TARGETS, MEMORY = "Targets", "KV-memory sweep"


def compare(
    target: Annotated[
        list[str],
        typer.Option(
            help="NAME=URL of a running server, or NAME=RECIPE to start one: nybble, vllm, lmdeploy or a .yaml file, "
            'with flags for it: a="nybble --max-num-seqs 8". Repeat for each.',
            rich_help_panel=TARGETS,
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md, results.json and figures.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="What recipes serve: `tiny`, a directory or a Hugging Face id; and which of a URL's models.",
            rich_help_panel=TARGETS,
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Ratios are to this target; default: the first.", rich_help_panel=TARGETS, show_default=False
        ),
    ] = None,
    order: Annotated[
        Literal["auto", "interleaved", "blocks"],
        typer.Option(
            help="Targets take turns, or run one after the other; auto: in turns where memory surely holds all.",
            rich_help_panel=TARGETS,
        ),
    ] = "auto",
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Recipes start with a prefix cache.", rich_help_panel=TARGETS)
    ] = False,
    allow_other_models: Annotated[
        bool,
        typer.Option(
            "--allow-other-models", help="Targets may name their models differently.", rich_help_panel=TARGETS
        ),
    ] = False,
    no_quality: Annotated[
        bool,
        typer.Option("--no-quality", help="No quality gate; for synthetic weights.", rich_help_panel=TARGETS),
    ] = False,
    api_key: flags.ApiKeyFlag = None,
    concurrency: flags.ConcurrencyFlag = None,
    request_rate: flags.RequestRateFlag = None,
    num_prompts: flags.NumPromptsFlag = None,
    input_len: flags.InputLenFlag = "128",
    output_len: flags.OutputLenFlag = None,
    prefix_len: flags.PrefixLenFlag = 0,
    num_prefixes: flags.NumPrefixesFlag = 1,
    turns: flags.TurnsFlag = 1,
    dataset: flags.DatasetFlag = None,
    dataset_kind: flags.DatasetKindFlag = None,
    seed: flags.SeedFlag = 0,
    repeat_prompts: flags.RepeatPromptsFlag = False,
    route: flags.RouteFlag = "completions",
    tokenizer: flags.TokenizerFlag = None,
    extra_body: flags.ExtraBodyFlag = None,
    repeats: flags.RepeatsFlag = 3,
    warmups: flags.WarmupsFlag = None,
    clients: flags.ClientsFlag = 1,
    goodput: flags.GoodputFlag = None,
    timeout: flags.TimeoutFlag = 600.0,
    memory_sweep: Annotated[
        str | None,
        typer.Option(
            help="Shares of memory to start each recipe with, e.g. 0.7,0.8,0.9,0.95,0.99.",
            rich_help_panel=MEMORY,
            show_default=False,
        ),
    ] = None,
    memory_batches: Annotated[
        str | None,
        typer.Option(
            help="Batches to load each with; default: --concurrency.", rich_help_panel=MEMORY, show_default=False
        ),
    ] = None,
    memory_flag: Annotated[
        str | None,
        typer.Option(
            help="The servers' flag that takes the share; default: the recipe's.",
            rich_help_panel=MEMORY,
            show_default=False,
        ),
    ] = None,
    resume: flags.ResumeFlag = False,
) -> None:
    """Put the same load on several engines and report which is faster, by how much, and how sure that is.

    All get the same prompts and the same explicit sampling; output lengths are verified; a quality gate compares their
    answers. Writes `report.html` (one file, opens from disk), `report.md` with PNG figures, and `results.json`.

    The last line of standard output is JSON. Exit code 1 if something failed; what was measured is reported.
    """
    from nybble.compare.comparison import Comparison
    from nybble.compare.memory_sweep import sweep, swept

    asked = _asked(
        target,
        model,
        baseline,
        order,
        request_rate,
        concurrency,
        num_prompts,
        memory_sweep is not None,
        workload={
            "input_len": flags.parse_span("--input-len", input_len),
            "output_len": None if output_len is None else flags.parse_span("--output-len", output_len),
            "prefix_len": prefix_len,
            "num_prefixes": num_prefixes,
            "num_turns": turns,
            "dataset": None if dataset is None else str(dataset),
            "dataset_kind": dataset_kind,
            "seed": seed,
            "repeats_prompts": repeat_prompts,
            "tokenizer": flags.tokenizer_directory(tokenizer or _own_tokenizer(model)),
            "route": route,
        },
        plan={
            "num_repeats": repeats,
            "num_warmups": warmups,
            "num_clients": clients,
            "objectives": flags.parse_objectives(goodput or []),
        },
        more={
            "api_key": api_key,
            "body": flags.parse_body(extra_body),
            "timeout": timeout,
            "prefix_cache": prefix_cache,
            "wants_quality": not no_quality,
            "allows_other_models": allow_other_models,
        },
    )
    values = flags.parse_rates("--memory-sweep", memory_sweep) if memory_sweep else []
    batches = flags.parse_counts("--memory-batches", memory_batches or concurrency or "1")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None
    warnings: list[str] = []

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warned(text: str) -> None:
        warnings.append(text)
        warn(text)

    from nybble.progress import Progress

    teller = PartTeller()
    comparison = Comparison(asked, out, resume=resume, say=say, warn=warned, on_news=teller)
    with ends_on_signals():
        with Progress(max(1, comparison.num_left()), flags.is_terminal()) as bar:
            teller.bar = bar
            comparison.run()
        cells: list[Cell] = []
        if values:
            num_cells = len(values) * len(batches) * len(swept(asked.specs, memory_flag))
            with Progress(num_cells, flags.is_terminal(), "cells") as bar:
                cells = sweep(
                    asked,
                    values,
                    batches,
                    out,
                    flag=memory_flag,
                    resume=resume,
                    say=say,
                    on_cells=lambda num_cells: bar.advance(0, num_cells),
                )
    _report(asked, comparison, cells, warnings, out)


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as Ctrl-C does: what it started is stopped first. A second one is ignored."""

    def end(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        print(f"{signal.Signals(number).name}: stopping what was started …", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked(
    targets: list[str],
    model: str | None,
    baseline: str | None,
    order: str,
    request_rate: str | None,
    concurrency: str | None,
    num_prompts: int | None,
    has_sweep: bool,
    *,
    workload: dict[str, Any],
    plan: dict[str, Any],
    more: dict[str, Any],
) -> Asked:
    """Check what was given, and put it together."""
    from nybble.bench.serve_run import Plan
    from nybble.bench.workload import Workload, WorkloadSettings
    from nybble.commands.bench_points import parse_points
    from nybble.compare.comparison import Asked, names_of
    from nybble.compare.order import choose_order
    from nybble.compare.recipe import parse_target
    from nybble.core import machine

    specs = [parse_target(text) for text in targets]
    names = names_of(specs)
    if len(specs) < 2 and not has_sweep:
        raise ConfigError("give at least two --target (or one with --memory-sweep)")
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: the targets are {', '.join(names)}")
    num_recipes = sum(spec.recipe is not None for spec in specs)
    if num_recipes and model is None:
        raise ConfigError("recipes need --model")
    if order == "auto":
        order, why = choose_order(specs, has_gpu=bool(machine.gpus()))
        print(f"order: {order}, because {why}", file=sys.stderr)
    flags.check_repeats(plan["num_repeats"])
    settings = WorkloadSettings(**workload)
    conversations = Workload(settings)
    num_entries = None if conversations.entries is None else len(conversations.entries)
    if conversations.due_times(1) is not None and not (concurrency or request_rate):
        raise ConfigError("compare does not replay a trace's times: give --concurrency or --request-rate")
    points = parse_points(concurrency, request_rate, num_prompts, num_entries)
    return Asked(
        specs=specs,
        points=points,
        workload=settings,
        plan=Plan(**plan),
        order=order,
        baseline=baseline or names[0],  # type: ignore[arg-type]
        model=model,
        **more,
    )


def _own_tokenizer(model: str | None) -> str | None:
    """The tokenizer of a model on this machine, so that prompts have exact lengths without asking for it."""
    is_here = model == "tiny" or (model is not None and (Path(model) / "tokenizer.json").is_file())
    return model if is_here else None


def _short(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the table for programs."""
    fields = ("output_throughput", "ratio", "median_ttft_ms", "median_tpot_ms", "failed")
    return {
        "label": line["label"],
        "targets": {name: {field: cell[field] for field in fields} for name, cell in line["targets"].items()},
    }


def _report(asked: Asked, comparison: Any, cells: list[Cell], warnings: list[str], out: Path) -> None:
    from nybble.compare.document import make_document
    from nybble.compare.plots import write_figures
    from nybble.compare.report import html, markdown, memory_table, quality_table, speed_table

    document = make_document(asked, comparison, cells, warnings)
    (out / "results.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    figures = write_figures(document, out)
    (out / "report.md").write_text(markdown(document, figures), "utf-8")
    (out / "report.html").write_text(html(document), "utf-8")
    console = make_console()
    show_rows_of(speed_table(document), console)
    if document["quality"]:
        show_rows_of(quality_table(document), console)
    if document["memory"]:
        show_rows_of(memory_table(document), console)
    for verdict in document["verdicts"]:
        console.print(f"{verdict['kind']}: {verdict['text']}", soft_wrap=True)
    for failure in document["failures"]:
        warn(failure)
    summary = {name: document[name] for name in ("benchmark", "complete", "baseline", "verdicts", "failures")}
    summary["table"] = [_short(line) for line in document["table"]]
    print(json.dumps({**summary, "report": str(out / "report.html")}, ensure_ascii=False), flush=True)
    failed_gate = [
        name for name, found in document["quality"].items() if isinstance(found, dict) and not found["is_passed"]
    ]
    if failed_gate:
        flags.fail(f"the quality gate failed for {', '.join(failed_gate)}: their answers differ from the baseline's")
    if document["failures"]:
        flags.fail(f"{len(document['failures'])} failures; what was measured is in {out}")
