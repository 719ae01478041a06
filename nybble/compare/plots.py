"""PNG figures of a comparison for papers and READMEs, with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers too."""
STATES = {"served": "#009E73", "failed": "#E69F00", "died": "#D55E00", "no start": "#BBBBBB"}


def write_figures(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Write each figure that there are figures for; returns the files' names."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure

    drawings: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
        "throughput": _throughput,
        "latency": _latency,
        "pareto": _pareto,
        "ratio": _ratio,
    }
    if not any(line["targets"] for line in document["table"]):
        drawings = {}  # nothing was measured
    files = []
    for name, draw in drawings.items():
        if name == "ratio" and len(document["targets"]) < 2:
            continue
        figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
        axes = figure.subplots()
        draw(axes, document)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        figure.savefig(folder / f"{name}.png")
        files.append(f"{name}.png")
    if document["memory"]:
        _memory(Figure, document, folder / "memory.png")
        files.append("memory.png")
    return files


def series(document: Mapping[str, Any], name: str) -> list[tuple[float, dict[str, Any]]]:
    """A target's loads and figures."""
    lines = sorted(document["table"], key=lambda line: line["load"])
    return [(line["load"], line["targets"][name]) for line in lines if name in line["targets"]]


def _each(document: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[float, dict[str, Any]]]]]:
    return [
        (name, COLORS[number % len(COLORS)], series(document, name)) for number, name in enumerate(document["targets"])
    ]


def _load_axis(axes: Any, document: Mapping[str, Any]) -> None:
    is_closed = document["settings"]["points"][0]["request_rate"] is None
    loads = sorted(line["load"] for line in document["table"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.minorticks_off()
    axes.set_xlabel("concurrent streams" if is_closed else "requests a second")


def _throughput(axes: Any, document: Mapping[str, Any]) -> None:
    for name, color, points in _each(document):
        points = [(load, cell) for load, cell in points if cell["spread"]]
        values = [cell["output_throughput"] for _, cell in points]
        errors = [
            [value - cell["spread"][0] for value, (_, cell) in zip(values, points, strict=True)],
            [cell["spread"][1] - value for value, (_, cell) in zip(values, points, strict=True)],
        ]
        axes.errorbar([load for load, _ in points], values, errors, label=name, color=color, marker="o", capsize=3)
    _load_axis(axes, document)
    axes.set(ylabel="output tokens/s", ylim=(0, None))


def _latency(axes: Any, document: Mapping[str, Any]) -> None:
    for name, color, points in _each(document):
        points = [(load, cell) for load, cell in points if cell["median_ttft_ms"] is not None]
        for kind, style in (("median", "-"), ("p99", "--")):
            values = [cell[f"{kind}_ttft_ms"] for _, cell in points]
            axes.plot([load for load, _ in points], values, style, color=color, marker=".", label=f"{name} {kind}")
    _load_axis(axes, document)
    axes.set_yscale("log", subs=[])
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:,g}")  # 200, not 2 × 10²
    axes.set(ylabel="time to first token, ms")


def _pareto(axes: Any, document: Mapping[str, Any]) -> None:
    for name, color, points in _each(document):
        points = [(load, cell) for load, cell in points if cell["median_tpot_ms"]]
        x = [1e3 / cell["median_tpot_ms"] for _, cell in points]
        y = [cell["output_throughput"] for _, cell in points]
        axes.plot(x, y, color=color, marker="o", label=name)
        for (load, _), at in zip(points, zip(x, y, strict=True), strict=True):
            axes.annotate(f"{load:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(
        xlabel="tokens/s for one user (1 / median TPOT)",
        ylabel="output tokens/s of all",
        xlim=(0, None),
        ylim=(0, None),
    )


def _ratio(axes: Any, document: Mapping[str, Any]) -> None:
    for name, color, points in _each(document):
        points = [(load, cell) for load, cell in points if cell["ratio"]]
        if not points:
            continue
        loads = [load for load, _ in points]
        axes.plot(loads, [cell["ratio"]["value"] for _, cell in points], color=color, marker="o", label=name)
        if all(cell["ratio"]["low"] is not None for _, cell in points):
            low, high = ([cell["ratio"][end] for _, cell in points] for end in ("low", "high"))
            axes.fill_between(loads, low, high, color=color, alpha=0.2, linewidth=0)
    for threshold, style in ((1.0, "-"), (1.1, ":"), (1.6, ":")):
        axes.axhline(threshold, color="gray", linestyle=style, linewidth=1)
    _load_axis(axes, document)
    axes.set(ylabel=f"output tokens/s, ratio to {document['baseline']}")


def _memory(figure_type: Any, document: Mapping[str, Any], path: Path) -> None:
    names = list(dict.fromkeys(cell["target"] for cell in document["memory"]))
    figure = figure_type(figsize=(4.6 * len(names), 4.2), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        cells = [cell for cell in document["memory"] if cell["target"] == name]
        values = sorted({cell["value"] for cell in cells})
        batches = sorted({cell["batch"] for cell in cells})
        for cell in cells:
            at = values.index(cell["value"]), batches.index(cell["batch"])
            axes.add_patch(_square(at, STATES[cell["state"]]))
            rate = cell["output_throughput"]
            text = cell["state"] if cell["state"] != "served" or rate is None else f"{rate:,.0f}"
            axes.annotate(text, at, ha="center", va="center", fontsize=7)
        axes.set(
            title=name,
            xlabel=cells[0]["setting"],
            ylabel="batch",
            xlim=(-0.5, len(values) - 0.5),
            ylim=(-0.5, len(batches) - 0.5),
        )
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    figure.savefig(path)


def _square(at: tuple[int, int], color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((at[0] - 0.48, at[1] - 0.48), 0.96, 0.96, facecolor=color, alpha=0.6)
