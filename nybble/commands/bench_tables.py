"""What `bench` shows on a terminal: tables, formulas, and the last line, which is JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from nybble.llm import LLM
    from nybble.perf.ceilings import Ceilings

LATENCIES = (("ttft", 1), ("tpot", 2), ("itl", 2), ("e2el", 0))
"""… and digits after the point, in ms."""
SERVE_FIELDS = (
    "num_prompts",
    "max_concurrency",
    "request_rate",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "request_goodput",
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for kind in ("mean", "median", "p99")),
)


def make_console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut off."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def show_rows_of(rows: Sequence[Sequence[str]], console: Console) -> None:
    """A table whose first row is its head."""
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def show_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line a point: medians of the repeats, and the spread of throughput."""
    has_goodput = any(row.get("request_goodput") is not None for row in rows)
    table = Table(box=None, pad_edge=False, caption="latencies: median / 99th percentile", caption_justify="left")
    table.add_column("load", no_wrap=True)
    titles = ["req/s", *(["goodput"] if has_goodput else []), "output tok/s", "least–most"]
    for title in (*titles, *(f"{name.upper()} ms" for name, _ in LATENCIES), "failed"):
        table.add_column(title, justify="right")
    for row in rows:
        least, most = row["spread"].get("output_throughput", (0.0, 0.0))
        table.add_row(
            row["label"],
            _number(row["request_throughput"], 2),
            *([_number(row.get("request_goodput"), 2)] if has_goodput else []),
            _number(row["output_throughput"], 1),
            f"{least:,.0f}–{most:,.0f}",
            *(
                f"{_number(row[f'median_{name}_ms'], digits)} / {_number(row[f'p99_{name}_ms'], digits)}"
                for name, digits in LATENCIES
            ),
            str(row["failed"]),
        )
    console.print(table)


def show_server_facts(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """What the engine's own /metrics and the GPU's memory said meanwhile, where there are any."""
    for row in rows:
        found = row.get("server") or {}
        texts = [
            text.format(found[name] / 1e6 if name.endswith("_bytes") else found[name])
            for name, text in (
                ("peak_running", "up to {:.0f} seen running"),
                ("peak_waiting", "up to {:.0f} seen waiting"),
                ("peak_kv_cache_usage", "KV cache up to {:.1%} full"),
                ("peak_resident_bytes", "{:,.0f} MB resident"),
                ("peak_gpu_memory_mib", "{:,.0f} MiB of GPU memory"),
                ("preemptions", "{:.0f} preemptions"),
                ("prefix_cache_hit_rate", "prefix-cache hits {:.1%}"),
            )
            if name in found and (found[name] or not name.startswith("peak_"))  # looks fall between short requests
        ]
        if texts:
            console.print(f"{row['label']}: server: {', '.join(texts)}", soft_wrap=True)


def show_memory(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Of an offline engine: the most that the process had resident, and what was in use on the GPUs."""
    resident = max(row["peak_resident_mib"] for row in rows)
    used = [row["gpu_memory_used_mib"] for row in rows if row.get("gpu_memory_used_mib") is not None]
    on_gpus = f", {max(used):,.0f} MiB in use on the GPUs" if used else ""
    console.print(f"peak memory: {resident:,.0f} MiB resident{on_gpus}")


def show_ceilings(ceilings: Ceilings, console: Console) -> None:
    console.print(
        f"ceilings: reading {ceilings.read_bytes_per_second / 1e12:.3f} TB/s, {ceilings.dtype} "
        f"{ceilings.flops_per_second / 1e12:,.2f} TFLOP/s ({ceilings.how})",
        soft_wrap=True,
    )


def show_formulas(formulas: Mapping[str, str], console: Console) -> None:
    console.print()
    for name, text in formulas.items():
        console.print(f"[dim]{name}: {text}[/]", highlight=False, soft_wrap=True)


def last_line(document: Mapping[str, Any], fields: Sequence[str], **more: Any) -> None:
    """The summary for programs: some fields of each row."""
    results = [{name: row.get(name) for name in ("label", *fields)} for row in document["results"]]
    summary = {"benchmark": document["benchmark"], "complete": document["complete"], "results": results, **more}
    print(json.dumps(summary, ensure_ascii=False), flush=True)


def engine_facts(llm: LLM) -> dict[str, Any]:
    """What nybble decided at start, for the results file."""
    return {"engine": dict(llm.config.table()), "startup": vars(llm.report)}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
