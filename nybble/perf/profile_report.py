"""A profile's document as tables (the first row is the head) and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nybble.perf.explain import explain
from nybble.perf.profile_document import step_name

Table = list[list[str]]


def steps_table(document: Mapping[str, Any]) -> Table:
    head = ["step", "tokens", "context", "ms", "floor ms", "of floor", "tok/s", "limit tok/s", "bound by"]
    return [
        head,
        *(
            [
                row["step"],
                f"{row['tokens']:,}",
                f"{row['context_len']:,}",
                _number(row["wall_ms"], 3),
                _number(row["floor_ms"], 3),
                _percent(row["of_floor"]),
                _number(row["tok_s"], 0 if (row["tok_s"] or 0) >= 1000 else 1),
                _number(row["limit_tok_s"], 0 if row["limit_tok_s"] >= 1000 else 1),
                row["bound"],
            ]
            for row in document["steps"]
        ),
    ]


def kinds_table(document: Mapping[str, Any]) -> Table:
    """A line a kind; for each step its ms, its share, and how near to its floor it is."""
    steps = document["steps"]
    is_measured = any(row["wall_ms"] is not None for row in steps)
    kinds = list(dict.fromkeys(kind["kind"] for row in steps for kind in row["kinds"]))
    table = [["", *(step_name(row) for row in steps)]]
    for kind in kinds:
        line = [kind]
        for row in steps:
            found = next((each for each in row["kinds"] if each["kind"] == kind), None)
            line.append("–" if found is None else _kind_cell(found, is_measured))
        table.append(line)
    return table


def parts_table(row: Mapping[str, Any]) -> Table:
    """One step's parts, the longest first."""
    head = ["part", "times", "ms", "floor ms", "of floor", "GB", "GFLOP", "bound by"]
    parts = sorted(row["parts"], key=lambda part: -(part["measured_ms"] or part["floor_ms"] or 0.0))
    return [
        head,
        *(
            [
                part["part"],
                f"{part['count']:g}",
                _number(part["measured_ms"], 3),
                _number(part["floor_ms"], 3),
                _percent(part["floor_ms"] / part["measured_ms"] if part["floor_ms"] and part["measured_ms"] else None),
                _number(None if part["bytes"] is None else part["bytes"] / 1e9, 3),
                _number(None if part["flops"] is None else part["flops"] / 1e9, 2),
                part["bound"] or "–",
            ]
            for part in parts
        ),
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """All of it: analysis, tables, how it was measured."""
    environment, machine = document["environment"], document["machine"]
    devices = f"{document['num_devices']} × " if document["num_devices"] > 1 else ""
    model = document["settings"]["model"]
    texts = [f"# {model} on {devices}{machine['name']}", environment["date"]]
    texts += ["## Steps", markdown_table(steps_table(document)), markdown_table(kinds_table(document))]
    texts += [explain(document).strip()]
    for row in document["steps"]:
        texts += [f"## Parts: {step_name(row)}", markdown_table(parts_table(row))]
    texts += ["## How to read it", "\n".join(f"- **{name}**: {text}" for name, text in document["formulas"].items())]
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    texts += [
        f"nybble {environment['nybble']} ({environment['commit']}), {versions}",
        f"`{' '.join(environment['command'])}`",
    ]
    return "\n\n".join(texts) + "\n"


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *rows = ["| " + " | ".join(row) + " |" for row in table]
    rule = "|" + "---|" + "--:|" * (len(table[0]) - 1)
    return "\n".join([head, rule, *rows])


def _kind_cell(kind: Mapping[str, Any], is_measured: bool) -> str:
    milliseconds = kind["measured_ms"] if is_measured else kind["floor_ms"]
    if milliseconds is None:
        return "within others"  # its work is done by another part's kernel
    return f"{_number(milliseconds, 3)} ({_percent(kind['share'])})"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.{1 if share < 0.0995 else 0}f} %"
