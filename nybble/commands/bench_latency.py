"""`nybble bench latency`: a fixed batch, offline; prefill and decode told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import engine_facts, last_line, make_console, show_formulas, show_memory, warn
from nybble.commands.options import with_flags

FORMULAS = {
    "prefill tok/s": "batch × input tokens / time of 1 output token",
    "decode tok/s": "batch × output tokens / (time of output tokens + 1 − time of 1 output token)",
    "peak memory": "the most that this process had resident; on the GPUs what is in use after a repeat",
    "a row": "median of the repeats; the first run of each batch, which warms up, is not in it",
}
FIELDS = ("batch", "input_len", "output_len", "decode_tok_s", "decode_step_ms", "prefill_tok_s", "prefill_seconds")


@with_flags(without=("enable_prefix_caching",))
def latency(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences that run together, e.g. 1,16,64.")] = "1",
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens to generate after the first.", min=1)] = 128,
    repeats: flags.RepeatsFlag = 3,
    output: flags.OutputFlag = None,
    csv: flags.CsvFlag = None,
    resume: flags.ResumeFlag = False,
    *,
    engine: dict[str, Any],
) -> None:
    """How fast a fixed batch runs: tokens a second in prefill and in decode, by batch size.

    Greedy, without a prefix cache, end-of-text ignored. The last line of standard output is JSON.
    """
    from nybble.commands.imports import ctrl_c_exits

    with ctrl_c_exits():
        from nybble.bench.offline import OfflineBench, opened_model
    from nybble.bench.results import ResultsFile
    from nybble.progress import Progress

    batches = flags.parse_counts("--batch-sizes", batch_sizes)
    flags.check_model(model, synthetic)
    flags.check_repeats(repeats)
    engine = {
        "max_num_seqs": max(batches),
        "max_model_len": input_len + output_len + 1,
        **engine,
        "enable_prefix_caching": False,
    }
    settings = {"model": model or synthetic, "input_len": input_len, "output_len": output_len, "engine": engine}
    results = ResultsFile("latency", output, settings, formulas=FORMULAS, resume=resume)
    results.write()
    console = make_console()
    with opened_model(model, synthetic, engine) as llm:
        results.facts = engine_facts(llm)
        bench = OfflineBench(llm)
        with Progress(len(batches) * repeats, flags.is_terminal()) as bar:
            for batch in batches:
                label = f"batch {batch}"
                is_warm = False
                for _ in range(results.num_repeats(label), repeats):
                    if not is_warm:
                        bench.latency(batch, input_len, min(output_len, 8))
                        bench.forget(batch)
                        is_warm = True
                    repeat = bench.latency(batch, input_len, output_len)
                    results.add(label, {"batch": batch}, repeat)
                    bar.advance(batch * (output_len + 2), 1, label)
    results.is_complete = True
    results.write()
    if csv is not None:
        results.write_csv(csv)
    rows = results.rows()
    _show(rows, console)
    show_memory(rows, console)
    show_formulas(FORMULAS, console)
    if not all(row["tokens_repeat"] for row in rows):
        warn("the same prompts gave other tokens in another repeat: this is not deterministic")
    last_line(results.document(), FIELDS, output=None if output is None else str(output))


def _show(rows: Sequence[Mapping[str, Any]], console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("batch", "decode tok/s", "least–most", "step ms", "prefill tok/s", "prefill s", "tokens repeat"):
        table.add_column(title, justify="right")
    for row in rows:
        least, most = row["spread"]["decode_tok_s"]
        table.add_row(
            str(row["batch"]),
            f"{row['decode_tok_s']:,.1f}",
            f"{least:,.1f}–{most:,.1f}",
            f"{row['decode_step_ms']:.2f}",
            f"{row['prefill_tok_s']:,.0f}",
            f"{row['prefill_seconds']:.3f}",
            "yes" if row["tokens_repeat"] else "NO",
        )
    console.print(table)
