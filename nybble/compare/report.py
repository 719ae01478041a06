"""Reports of a comparison: one HTML file that needs nothing else, and Markdown. They only show the document."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"


def html(document: Mapping[str, Any]) -> str:
    """The report as one page: tables, and plots that Plotly, which is inside, draws."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (ASSETS / "report.html").read_text("utf-8")
    )
    shown = {name: document[name] for name in ("table", "targets", "baseline", "memory", "settings")}
    shown["targets"] = list(document["targets"])
    # No text of a server may end the script element.
    data = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")
    return template.render(
        document=document,
        data=data,
        plotly=(ASSETS / "plotly-basic.min.js").read_text("utf-8"),
        table=speed_table(document),
        quality=quality_table(document),
        memory=memory_table(document),
        machine=machine_lines(document),
        commands=command_lines(document),
        notes=notes(document),
    )


def markdown(document: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The report for a README."""
    environment = document["environment"]
    parts = [f"# {' against '.join(document['targets'])}", f"{environment['date']}"]
    parts += ["## Verdict", *(f"- **{verdict['kind']}**: {verdict['text']}" for verdict in document["verdicts"])]
    parts += ["## Throughput and latency", _markdown_table(speed_table(document))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    if document["quality"]:
        parts += ["## Quality gate", _markdown_table(quality_table(document))]
    if document["memory"]:
        parts += ["## KV memory", _markdown_table(memory_table(document))]
    parts += ["## How it was measured", *(f"- {note}" for note in notes(document))]
    parts += ["## Machine and versions", *(f"- {line}" for line in machine_lines(document))]
    parts += ["## Commands", "```\n" + "\n".join(command_lines(document)) + "\n```"]
    text = "\n\n".join(parts) + "\n"
    return text.replace("\n\n- ", "\n- ")


def speed_table(document: Mapping[str, Any]) -> list[list[str]]:
    """The study's table; the first row is its head."""
    names = list(document["targets"])
    base = document["baseline"]
    head = ["load", *(f"{name} tok/s" for name in names), *(f"{name} / {base}" for name in names if name != base)]
    head += [f"{name} {title}" for title in ("TTFT ms", "TPOT ms") for name in names]
    head += [f"{name} failed" for name in names]
    rows = [head]
    for line in document["table"]:
        cells = [line["targets"].get(name) for name in names]
        row = [line["label"], *(_throughput(cell) for cell in cells)]
        row += [_ratio(line["targets"].get(name)) for name in names if name != base]
        row += [_latency(cell, field, digits) for field, digits in (("ttft", 1), ("tpot", 2)) for cell in cells]
        row += ["–" if cell is None else str(cell["failed"]) for cell in cells]
        rows.append(row)
    return rows


def quality_table(document: Mapping[str, Any]) -> list[list[str]]:
    rows = [["target", "answers the same", "tokens before the first difference", "Δ log-probability", "gate"]]
    for name, found in document["quality"].items():
        if name == document["baseline"] and not isinstance(found, str):
            rows.append([name, "baseline", "", "", ""])
        elif isinstance(found, str):
            rows.append([name, "not known", found, "", ""])
        else:
            distance = "–" if found["distance"] is None else f"{found['distance']:.4f}"
            same = f"{found['num_identical']} of {found['num_prompts']}"
            rows.append([name, same, f"{found['share']:.0%}", distance, "passed" if found["is_passed"] else "FAILED"])
    return rows


def memory_table(document: Mapping[str, Any]) -> list[list[str]]:
    rows = [["target", "setting", "batch", "outcome", "tok/s", "failed", "KV full at most", "what it said"]]
    for cell in document["memory"]:
        rate, usage = cell["output_throughput"], cell["peak_kv_cache_usage"]
        rows.append(
            [
                cell["target"],
                f"{cell['setting']} = {cell['value']:g}",
                str(cell["batch"]),
                cell["state"],
                "–" if rate is None else f"{rate:,.1f}",
                str(cell["num_failed"]),
                "–" if usage is None else f"{usage:.0%}",
                cell["detail"],
            ]
        )
    return rows


def notes(document: Mapping[str, Any]) -> list[str]:
    """What a reader needs to judge the figures."""
    settings = document["settings"]
    workload, plan = settings["workload"], settings["plan"]
    low, high = workload["input_len"]
    asked = workload["output_len"] or (None if workload["dataset"] else [64, 64])
    outputs = "output tokens as it says, else 64" if asked is None else f"{_span(*asked)} output tokens"
    order = "in turns (A B A B)" if settings["order"] == "interleaved" else "one target after the other (blocks)"
    sampling = ", ".join(f"{name} {value}" for name, value in document["sampling"].items())
    source = (
        f"prompts of {workload['dataset']}" if workload["dataset"] else f"random prompts of {_span(low, high)} tokens"
    )
    return [
        f"Workload: {source}, {outputs}, {workload['route']} route, seed {workload['seed']}; "
        "the same prompts for all targets" + ("" if workload["repeats_prompts"] else ", none of them twice"),
        f"{plan['num_repeats']} repeats {order}, each after a warm-up; figures are medians, ranges are least to most, "
        "ratios have 95 % confidence intervals",
        f"Sampling sent with each request: {sampling}",
        f"Output lengths: {document['lengths']}",
        *([] if settings["wants_quality"] else ["No quality gate (--no-quality): answers were not compared"]),
        *(f"Memory of {text}" for text in document["peak_memory"]),
        *(f"Prefix cache of {text}" for text in document["prefix_cache"]),
        *(f"Warning: {text}" for text in document["warnings"]),
        *(f"Failure: {text}" for text in document["failures"]),
        *(f"{name}: {text}" for name, text in document["formulas"].items()),
    ]


def machine_lines(document: Mapping[str, Any]) -> list[str]:
    environment = document["environment"]
    lines = [
        f"{environment['cpu']}, {environment['num_cores']} cores, {environment['memory_gib']} GiB, "
        f"{environment['system']}",
        *(
            f"{gpu['name']}, {gpu['memory_mib']} MiB, driver {gpu['driver']}, SM clock {gpu['sm_clock_mhz']} of "
            f"{gpu['max_sm_clock_mhz']} MHz, power limit {gpu['power_limit_w']} W"
            for gpu in environment["gpus"]
        ),
        f"nybble {environment['nybble']}, commit {environment['commit'] or 'not known'}, "
        f"Python {environment['python']}",
        ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
    ]
    for name, facts in document["targets"].items():
        ready = f", ready after {facts['ready_seconds']:.1f} s" if "ready_seconds" in facts else ""
        lines.append(f"{name}: version {facts.get('version') or 'not known'}, model {facts.get('model')}{ready}")
    return lines


def command_lines(document: Mapping[str, Any]) -> list[str]:
    """What to run to repeat it."""
    lines = [shlex.join(document["environment"]["command"])]
    for name, facts in document["targets"].items():
        variables = "".join(f"{key}={shlex.quote(value)} " for key, value in facts.get("env", {}).items())
        command = shlex.join(facts["command"]) if "command" in facts else f"running at {facts.get('url')}"
        lines.append(f"# {name}: {variables}{command}")
    return lines


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}–{high}"


def _throughput(cell: Mapping[str, Any] | None) -> str:
    if cell is None or not cell["completed"]:
        return "–"
    least, most = cell["spread"]
    return f"{cell['output_throughput']:,.1f} ({least:,.1f}–{most:,.1f})"


def _ratio(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["ratio"] is None:
        return "–"
    ratio = cell["ratio"]
    span = "" if ratio["low"] is None else f" ({ratio['low']:.2f}–{ratio['high']:.2f})"
    return f"{ratio['value']:.2f}{span}"


def _latency(cell: Mapping[str, Any] | None, name: str, digits: int) -> str:
    if cell is None or cell[f"median_{name}_ms"] is None:
        return "–"
    return f"{cell[f'median_{name}_ms']:,.{digits}f} / {cell[f'p99_{name}_ms']:,.{digits}f}"
