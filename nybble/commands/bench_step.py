"""`nybble bench step`: a whole decode step, the device's time of it against the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import engine_facts, last_line, make_console, show_ceilings, show_formulas
from nybble.commands.options import with_flags
from nybble.core.errors import ConfigError

FORMULAS = {
    "device ms": "the step's CUDA graph replayed between events, median; on a CPU the model and the greedy choice",
    "wall ms": "one turn of the engine's loop with all sequences decoding, mean of the steps",
    "host loss": "1 − device / wall",
    "tok/s": "batch / wall",
    "GB": "weights and keys and values that a step cannot do without, once each, from the operations' costs",
    "of reading, of roofline": "GB / device / read ceiling; sum of the operations' rooflines / device",
    "a row": "median of the repeats, each number by itself",
}
FIELDS = (
    "batch",
    "context_len",
    "device_ms",
    "wall_ms",
    "host_loss",
    "tok_s",
    "bytes",
    "tb_s",
    "read_share",
    "roofline_ms",
    "roofline_share",
)


@with_flags(without=("enable_prefix_caching", "max_model_len", "max_num_seqs"))
def step(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences that decode together, e.g. 1,16,64.")] = "1,16,64",
    context_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    num_steps: Annotated[int, typer.Option(help="Steps of a repeat.", min=1)] = 32,
    repeats: flags.RepeatsFlag = 3,
    output: flags.OutputFlag = None,
    csv: flags.CsvFlag = None,
    *,
    engine: dict[str, Any],
) -> None:
    """How long one decode step of the engine takes: on the device, and with all that the host does around it.

    Greedy, without a prefix cache, end-of-text ignored. The ceilings are measured in the same run, before the model is
    loaded. The last line of standard output is JSON.
    """
    from nybble.commands.imports import ctrl_c_exits

    with ctrl_c_exits():
        import torch

        from nybble.bench.offline import opened_model
        from nybble.perf.step_bench import StepBench, tokens_needed
    from nybble.bench.results import ResultsFile
    from nybble.perf.ceilings import measure_ceilings
    from nybble.perf.located import located
    from nybble.progress import Progress

    batches = flags.parse_counts("--batch-sizes", batch_sizes)
    flags.check_model(model, synthetic)
    flags.check_repeats(repeats)
    _, resolved = located(model, synthetic, engine)
    num_batched = max(resolved.max_num_batched_tokens, max(batches))
    extra = max(tokens_needed(batch, context_len, num_steps, num_batched) for batch in batches)
    if context_len + extra > resolved.max_model_len:
        raise ConfigError(
            f"--context-len {context_len}: with the {extra} tokens to generate it is longer than the model's "
            f"{resolved.max_model_len} positions"
        )
    engine = {
        **engine,
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": num_batched,
        "max_model_len": context_len + extra,
        "enable_prefix_caching": False,
    }
    settings = {"model": model or synthetic, "context_len": context_len, "num_steps": num_steps, "engine": engine}
    results = ResultsFile("step", output, settings, formulas=FORMULAS)
    results.write()
    ceilings = measure_ceilings(torch.device(resolved.device), getattr(torch, resolved.dtype))
    console = make_console()
    with opened_model(model, synthetic, engine) as llm:
        results.facts = engine_facts(llm) | {"ceilings": asdict(ceilings)}
        bench = StepBench(llm, ceilings, context_len)
        with Progress(len(batches) * repeats, flags.is_terminal()) as bar:
            for batch in batches:
                for _ in range(repeats):
                    results.add(f"batch {batch}", {"batch": batch}, bench.measure(batch, num_steps))
                    bar.advance(batch * num_steps, 1, f"batch {batch}")
    results.is_complete = True
    results.write()
    if csv is not None:
        results.write_csv(csv)
    _show(results.rows(), console)
    show_ceilings(ceilings, console)
    show_formulas(FORMULAS, console)
    summary = {"ceilings": asdict(ceilings), "output": None if output is None else str(output)}
    last_line(results.document(), FIELDS, **summary)


def _show(rows: Sequence[Mapping[str, Any]], console: Any) -> None:
    from rich.table import Table

    titles = ("batch", "device ms", "wall ms", "least–most", "host loss", "tok/s", "GB", "TB/s", "of reading")
    table = Table(box=None, pad_edge=False)
    for title in (*titles, "of roofline"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        least, most = row["spread"]["wall_ms"]
        table.add_row(
            str(row["batch"]),
            f"{row['device_ms']:,.3f}",
            f"{row['wall_ms']:,.3f}",
            f"{least:,.3f}–{most:,.3f}",
            f"{row['host_loss']:.1%}",
            f"{row['tok_s']:,.1f}",
            f"{row['bytes'] / 1e9:,.3f}",
            f"{row['tb_s']:.4f}",
            f"{row['read_share']:.0%}",
            f"{row['roofline_share']:.0%}",
        )
    console.print(table)
