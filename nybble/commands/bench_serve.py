"""`nybble bench serve`: load on a running OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated

import msgspec
import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_points import make_points, swept
from nybble.commands.bench_progress import PartTeller
from nybble.commands.bench_tables import (
    SERVE_FIELDS,
    last_line,
    make_console,
    show_formulas,
    show_rows,
    show_server_facts,
    warn,
)
from nybble.core.errors import ConfigError


def serve(
    base_url: Annotated[str, typer.Option(help="The server, e.g. http://127.0.0.1:8000.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Its name in the API; default: the one served.", show_default=False)
    ] = None,
    api_key: flags.ApiKeyFlag = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the server to answer.")] = 0.0,
    concurrency: flags.ConcurrencyFlag = None,
    request_rate: flags.RequestRateFlag = None,
    burstiness: Annotated[
        float,
        typer.Option(
            help="Shape of the gamma-distributed gaps: 1 Poisson, less bursts, more even, inf regular.",
            rich_help_panel=flags.LOAD,
        ),
    ] = 1.0,
    ramp_to: Annotated[
        float | None,
        typer.Option(help="The rate changes to this during a point.", rich_help_panel=flags.LOAD, show_default=False),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(help="Most requests at once in an open loop.", rich_help_panel=flags.LOAD, show_default=False),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Double the concurrency, or the rate, until throughput no longer grows.",
            rich_help_panel=flags.LOAD,
        ),
    ] = False,
    num_prompts: flags.NumPromptsFlag = None,
    input_len: flags.InputLenFlag = "128",
    output_len: flags.OutputLenFlag = None,
    prefix_len: flags.PrefixLenFlag = 0,
    num_prefixes: flags.NumPrefixesFlag = 1,
    turns: flags.TurnsFlag = 1,
    dataset: flags.DatasetFlag = None,
    dataset_kind: flags.DatasetKindFlag = None,
    trace_speed: Annotated[
        float, typer.Option(help="Replay a trace so many times as fast.", rich_help_panel=flags.WORKLOAD)
    ] = 1.0,
    seed: flags.SeedFlag = 0,
    repeat_prompts: flags.RepeatPromptsFlag = False,
    route: flags.RouteFlag = "completions",
    tokenizer: flags.TokenizerFlag = None,
    prompt_ids: Annotated[
        bool,
        typer.Option(
            "--prompt-ids", help="Send token ids, not text; needs --tokenizer.", rich_help_panel=flags.WORKLOAD
        ),
    ] = False,
    temperature: flags.TemperatureFlag = 0.0,
    no_ignore_eos: flags.NoIgnoreEosFlag = False,
    extra_body: flags.ExtraBodyFlag = None,
    repeats: flags.RepeatsFlag = 3,
    warmups: flags.WarmupsFlag = None,
    clients: flags.ClientsFlag = 1,
    goodput: flags.GoodputFlag = None,
    return_token_ids: Annotated[
        bool,
        typer.Option(
            "--return-token-ids",
            help="Ask for each event's token ids, so that gaps are known by token (nybble, vLLM).",
            rich_help_panel=flags.MEASURE,
        ),
    ] = False,
    timeout: flags.TimeoutFlag = 600.0,
    output: flags.OutputFlag = None,
    csv: flags.CsvFlag = None,
    detailed: flags.DetailedFlag = False,
    resume: flags.ResumeFlag = False,
) -> None:
    """Put load on a running server that speaks OpenAI's API, and tell its throughput and latencies.

    A closed loop keeps a number of streams busy (`--concurrency`); an open loop sends requests at a rate, whatever the
    server does (`--request-rate`), or as a trace tells. Each point is warmed up and repeated; figures are medians.
    Generated prompts never repeat, so that a prefix cache does not help, unless asked.

    The last line of standard output is JSON. Exit code 1 if a request failed; what was measured is kept.
    """
    from nybble.bench.metrics import FORMULAS
    from nybble.bench.probe import probe
    from nybble.bench.results import ResultsFile
    from nybble.bench.serve_run import Plan, ServeRun
    from nybble.bench.target import TargetSettings
    from nybble.bench.workload import Workload, WorkloadSettings
    from nybble.progress import Progress

    if min(repeats, clients) < 1 or (warmups or 0) < 0 or not timeout > 0 or not trace_speed > 0 or not burstiness > 0:
        raise ConfigError(
            "--repeats and --clients must be at least 1, --warmups 0, --timeout, --trace-speed and --burstiness above 0"
        )
    workload = WorkloadSettings(
        input_len=flags.parse_span("--input-len", input_len),
        output_len=None if output_len is None else flags.parse_span("--output-len", output_len),
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        num_turns=turns,
        dataset=None if dataset is None else str(dataset),
        dataset_kind=dataset_kind,
        seed=seed,
        repeats_prompts=repeat_prompts,
        as_ids=prompt_ids,
        tokenizer=flags.tokenizer_directory(tokenizer),
        route=route,
    )
    # Everything that can be wrong with the flags shows before a request is sent.
    conversations = Workload(workload)
    trace = conversations.due_times(1 << 30)
    points = make_points(
        flags.parse_counts("--concurrency", concurrency) if concurrency else [],
        flags.parse_rates("--request-rate", request_rate) if request_rate else [],
        {
            "burstiness": burstiness,
            "end_rate": ramp_to,
            "concurrency": max_concurrency,
        },
        num_prompts,
        trace,
        trace_speed,
        None if conversations.entries is None else len(conversations.entries),
        is_sweep=sweep,
    )
    plan = Plan(
        num_repeats=repeats,
        num_warmups=warmups,
        num_clients=clients,
        objectives=flags.parse_objectives(goodput or []),
        is_detailed=detailed,
    )
    name = asyncio.run(_wait_for(base_url, api_key, model, wait))
    target = TargetSettings(
        base_url=base_url,
        model=name,
        route=route,
        api_key=api_key,
        ignore_eos=not no_ignore_eos,
        wants_token_ids=return_token_ids,
        body={"temperature": temperature, **flags.parse_body(extra_body)},
        timeout=timeout,
    )
    settings = {
        "target": msgspec.structs.replace(target, api_key="***" if api_key else None),
        "workload": workload,
        "plan": msgspec.structs.replace(plan, num_repeats=0),  # more repeats may be added to a file
    }
    results = ResultsFile("serve", output, settings, formulas=FORMULAS, resume=resume)
    if not results.num_dropped:
        results.write()  # a path that cannot be written shows now
    else:
        warn(f"{results.num_dropped} repeats of {output} had faults and are measured again")
    probed = asyncio.run(probe(target, workload.input_len[1], conversations.count))
    for note in probed.notes:
        warn(note)
    workload = msgspec.structs.replace(workload, word_cost=probed.word_cost)
    console = make_console()
    left = sum(point.num_prompts * max(0, repeats - results.num_repeats(point.label)) for point in points)
    # A sweep ends where throughput stops to grow.
    with Progress(None if sweep else max(1, left), flags.is_terminal()) as bar:
        run = ServeRun(target, workload, plan, results, trace=trace, warn=warn, on_news=PartTeller(bar))
        rows = list(run.measure(swept(points[0], results) if sweep else points))
    results.is_complete = not run.failures
    results.write()
    if csv is not None:
        results.write_csv(csv)
    if rows:
        show_rows(rows, console)
        show_server_facts(rows, console)
        show_formulas(FORMULAS, console)
    for failure in run.failures:
        print(f"error: {failure}", file=sys.stderr)
    if run.failures and output is not None:
        print(f"error: what was measured is in {output}; --resume goes on with it", file=sys.stderr)
    last_line(results.document(), SERVE_FIELDS, output=None if output is None else str(output), failures=run.failures)
    if run.failures:
        raise typer.Exit(1)


async def _wait_for(base_url: str, api_key: str | None, model: str | None, seconds: float) -> str:
    from nybble.bench.target import served_model

    deadline = time.monotonic() + seconds
    while True:
        try:
            return await served_model(base_url, api_key, model)
        except ConfigError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.5)
