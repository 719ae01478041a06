"""`nybble bench throughput`: many requests at once, offline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import engine_facts, last_line, make_console, show_formulas, show_memory
from nybble.commands.options import with_flags

FORMULAS = {
    "requests_per_second": "requests / time from handing in the first to the end of the last",
    "tokens_per_second": "(input + output tokens) / that time",
    "output_throughput": "output tokens / that time",
    "peak memory": "the most that this process had resident; on the GPUs what is in use after a repeat",
}
FIELDS = ("num_requests", "elapsed_time", "requests_per_second", "tokens_per_second", "output_throughput", "failed")


@with_flags()
def throughput(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    num_prompts: flags.NumPromptsFlag = None,
    input_len: flags.InputLenFlag = "128",
    output_len: flags.OutputLenFlag = None,
    prefix_len: flags.PrefixLenFlag = 0,
    num_prefixes: flags.NumPrefixesFlag = 1,
    dataset: flags.DatasetFlag = None,
    dataset_kind: flags.DatasetKindFlag = None,
    prompt_seed: Annotated[int, typer.Option(help="Of prompts and lengths.", rich_help_panel=flags.WORKLOAD)] = 0,
    repeats: flags.RepeatsFlag = 3,
    output: flags.OutputFlag = None,
    csv: flags.CsvFlag = None,
    resume: flags.ResumeFlag = False,
    *,
    engine: dict[str, Any],
) -> None:
    """How many requests and tokens a second nybble does when all requests are there at once.

    Greedy, end-of-text ignored; no prompt repeats. The last line of standard output is JSON. Exit code 1 if a request
    failed.
    """
    from nybble.commands.imports import ctrl_c_exits

    with ctrl_c_exits():
        from nybble.bench.offline import OfflineBench, opened_model
    from nybble.bench.results import ResultsFile
    from nybble.bench.workload import WorkloadSettings

    flags.check_model(model, synthetic)
    flags.check_repeats(repeats)
    workload = WorkloadSettings(
        input_len=flags.parse_span("--input-len", input_len),
        output_len=None if output_len is None else flags.parse_span("--output-len", output_len),
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        dataset=None if dataset is None else str(dataset),
        dataset_kind=dataset_kind,
        seed=prompt_seed,
    )
    workload.check()
    settings = {"model": model or synthetic, "num_prompts": num_prompts, "workload": workload, "engine": engine}
    results = ResultsFile("throughput", output, settings, formulas=FORMULAS, resume=resume)
    results.write()
    console = make_console()
    with opened_model(model, synthetic, engine) as llm:
        results.facts = engine_facts(llm)
        bench = OfflineBench(llm)
        count = num_prompts or 100
        label = f"{count} requests"
        if results.num_repeats(label) < repeats:
            bench.throughput(workload, min(count, 8), "warm-up", False)
        for repeat in range(results.num_repeats(label), repeats):
            found = bench.throughput(workload, count, f"repeat {repeat}", flags.is_terminal())
            results.add(label, {"num_prompts": count}, found)
    (row,) = results.rows()
    results.is_complete = not row["failed"]
    results.write()
    if csv is not None:
        results.write_csv(csv)
    least, most = row["spread"]["output_throughput"]
    console.print(
        f"{count} requests in {row['elapsed_time']:.2f} s: {row['requests_per_second']:,.2f} req/s, "
        f"{row['output_throughput']:,.1f} output tok/s (from {least:,.1f} to {most:,.1f}), "
        f"{row['tokens_per_second']:,.1f} total tok/s"
    )
    show_memory([row], console)
    show_formulas(FORMULAS, console)
    last_line(results.document(), FIELDS, output=None if output is None else str(output))
    if row["failed"]:
        flags.fail(f"{row['failed']} requests failed: {row.get('error')}")
