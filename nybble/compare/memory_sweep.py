"""The KV-memory sweep: started with a share of memory and loaded with batches, does an engine start and survive?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from nybble.bench.points import Point
from nybble.bench.probe import probe
from nybble.bench.results import ResultsFile
from nybble.bench.serve_run import Plan, ServeRun
from nybble.bench.target import TargetSettings, served_model
from nybble.bench.workload import Workload, WorkloadSettings
from nybble.compare.launch import Launched
from nybble.compare.recipe import TargetSpec
from nybble.core.errors import NybbleError

State = Literal["served", "failed", "died", "no start"]


class Cell(msgspec.Struct, kw_only=True):
    """One target with one share of memory under one batch. `output_throughput`: tokens a second."""

    target: str
    setting: str
    value: float
    batch: int
    state: State
    output_throughput: float | None = None
    num_failed: int = 0
    preemptions: float | None = None
    peak_kv_cache_usage: float | None = None
    detail: str = ""


def sweep(
    spec: TargetSpec,
    model: str,
    values: Sequence[float],
    batches: Sequence[int],
    workload: WorkloadSettings,
    body: dict[str, Any],
    folder: Path,
    *,
    flag: str | None = None,
    timeout: float = 600.0,
    say: Callable[[str], None],
) -> Iterator[Cell]:
    """Each value is a start of its own.

    Args:
        flag: takes the value, instead of the recipe's.
    """
    recipe = spec.recipe
    assert recipe is not None
    setting = flag or recipe.memory_flag
    if setting is None:
        return
    name = setting.lstrip("-").replace("-", "_")
    for value in values:
        say(f"{spec.name}: {name} = {value:g} …")
        cell = {"target": spec.name, "setting": name, "value": value}
        try:
            launched = Launched(recipe, model, model, [*spec.flags, setting, f"{value:g}"], folder / f"{spec.name}.log")
            with launched:
                launched.wait_ready()
                url = launched.url
                target = TargetSettings(
                    base_url=url,
                    model=asyncio.run(served_model(url, None, None)),
                    route=workload.route,
                    body=body,
                    timeout=timeout,
                )
                yield from _loaded(launched, target, batches, workload, cell)
        except NybbleError as error:
            for batch in batches:
                yield Cell(**cell, batch=batch, state="no start", detail=str(error))


def _loaded(
    launched: Launched,
    target: TargetSettings,
    batches: Sequence[int],
    workload: WorkloadSettings,
    cell: dict[str, Any],
) -> Iterator[Cell]:
    probed = asyncio.run(probe(target, workload.input_len[1], Workload(workload).count))
    workload = msgspec.structs.replace(workload, word_cost=probed.word_cost)
    for batch in batches:
        if not launched.is_alive:
            yield Cell(**cell, batch=batch, state="died", detail=launched.last_words())
            continue
        results = ResultsFile("serve", None, {}, formulas={})
        run = ServeRun(target, workload, Plan(num_repeats=1, num_warmups=1), results, warn=lambda text: None)
        try:
            rows = list(run.measure([Point(num_prompts=2 * batch, concurrency=batch)]))
        finally:
            run.close()
        row = rows[0] if rows else {}
        is_dead = run.has_died or not launched.is_healthy()
        num_failed = int(row.get("failed", 0)) + int(row.get("num_unsent", 0) or 0)
        yield Cell(
            **cell,
            batch=batch,
            state="died" if is_dead else "failed" if num_failed else "served",
            output_throughput=row.get("output_throughput"),
            num_failed=num_failed,
            preemptions=row.get("server", {}).get("preemptions"),
            peak_kv_cache_usage=row.get("server", {}).get("peak_kv_cache_usage"),
            detail=(run.failures or [""])[0],
        )
