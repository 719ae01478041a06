"""`nybble bench startup`: from nothing to the first token, cold and warm, by phase."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from nybble.commands import bench_options as flags
from nybble.commands.bench_tables import last_line, make_console, show_formulas
from nybble.commands.options import with_flags

FORMULAS = {
    "cold": "the checkpoint's files are not in the page cache, and kernels are compiled anew",
    "warm": "files and compiled kernels are there from the start before",
    "total": "from starting a process to its first token",
}


@with_flags()
def startup(
    model: flags.OptionalModel = None,
    synthetic: flags.SyntheticFlag = None,
    repeats: flags.RepeatsFlag = 3,
    output: flags.OutputFlag = None,
    csv: flags.CsvFlag = None,
    resume: flags.ResumeFlag = False,
    *,
    engine: dict[str, Any],
) -> None:
    """How long a start takes, by phase: cold (nothing cached) and warm. Each is a process of its own.

    The last line of standard output is JSON.
    """
    from nybble.bench.results import ResultsFile
    from nybble.bench.startup import FIELDS, measure
    from nybble.bench.synthetic import synthetic_directory
    from nybble.core.config import EngineConfig
    from nybble.models.checkpoint import Checkpoint
    from nybble.progress import Progress

    flags.check_model(model, synthetic)
    flags.check_repeats(repeats)
    settings = {"model": model or synthetic, "engine": engine}
    results = ResultsFile("startup", output, settings, formulas=FORMULAS, resume=resume)
    results.write()
    if model is not None:  # a download is no part of a start
        located = Checkpoint.locate(EngineConfig.from_settings(model=model, **engine))
        place, options = nullcontext(str(located.path)), engine
    else:
        assert synthetic is not None
        place, options = synthetic_directory(synthetic), {"load_format": "dummy", **engine}
    with place as path, Progress(2 * repeats, flags.is_terminal()) as bar:
        for label in ("cold", "warm"):
            num_there = results.num_repeats(label)
            if label == "warm" and num_there < repeats:
                measure({"model": path, **options}, is_cold=False)
            for _ in range(num_there, repeats):
                results.add(
                    label, {"is_cold": label == "cold"}, measure({"model": path, **options}, is_cold=label == "cold")
                )
                bar.advance(0, 1, label)
    results.is_complete = True
    results.write()
    if csv is not None:
        results.write_csv(csv)
    _show(results.rows(), FIELDS)
    show_formulas(FORMULAS, make_console())
    last_line(results.document(), ("total_seconds", *FIELDS), output=None if output is None else str(output))


def _show(rows: list[dict[str, Any]], fields: tuple[str, ...]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("seconds")
    for row in rows:
        table.add_column(row["label"], justify="right")
        table.add_column("least–most", justify="right")
    for field in (*fields, "total_seconds"):
        cells = [field.removesuffix("_seconds").replace("_", " ")]
        for row in rows:
            least, most = row["spread"][field]
            cells += [f"{row[field]:.2f}", f"{least:.2f}–{most:.2f}"]
        table.add_row(*cells)
    make_console().print(table)
