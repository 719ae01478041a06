"""The KV-memory sweep: started with a share of memory and loaded with batches, does an engine start and survive?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from nybble.bench.points import Point
from nybble.bench.probe import probe
from nybble.bench.results import ResultsFile, to_json
from nybble.bench.serve_run import Plan, ServeRun
from nybble.bench.target import TargetSettings, served_model
from nybble.bench.workload import Workload, WorkloadSettings
from nybble.compare.comparison import SAMPLING, Asked, cache_flags
from nybble.compare.launch import Launched
from nybble.compare.recipe import TargetSpec
from nybble.core.errors import ConfigError, NybbleError

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
    asked: Asked,
    values: Sequence[float],
    batches: Sequence[int],
    folder: Path,
    *,
    flag: str | None = None,
    resume: bool = False,
    say: Callable[[str], None],
    on_cells: Callable[[int], None] = lambda num_cells: None,
) -> list[Cell]:
    """Start each recipe with each value and load it with each batch. `memory.json` in the folder has what is done.

    Args:
        flag: takes the value, instead of the recipe's own.
        on_cells: called with how many more are done.
    """
    file = folder / "memory.json"
    settings: dict[str, Any] = {
        "model": asked.model,
        "targets": {spec.name: spec for spec in asked.specs},
        "workload": asked.workload,
        "body": asked.body,
        "prefix_cache": asked.prefix_cache,
    }
    cells = _read(file, to_json(settings)) if resume else []
    done = {(cell.target, cell.setting, cell.value, cell.batch) for cell in cells}
    for spec, setting in swept(asked.specs, flag):
        name = setting.lstrip("-").replace("-", "_")
        for value in values:
            left = [batch for batch in batches if (spec.name, name, value, batch) not in done]
            if left:
                say(f"{spec.name}: {name} = {value:g} …")
                cells += _at(asked, spec, setting, value, left, folder)
                file.write_bytes(msgspec.json.format(msgspec.json.encode({"settings": settings, "cells": cells})))
            on_cells(len(batches))
    return cells


def swept(specs: Sequence[TargetSpec], flag: str | None) -> list[tuple[TargetSpec, str]]:
    """The targets that are started, each with the flag that takes its share of memory."""
    started = [(spec, flag or spec.recipe.memory_flag) for spec in specs if spec.recipe is not None]
    return [(spec, setting) for spec, setting in started if setting is not None]


class _File(msgspec.Struct):
    settings: dict[str, Any]
    cells: list[Cell]


def _read(file: Path, settings: dict[str, Any]) -> list[Cell]:
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_File)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--resume: {file}: {error}; remove it to begin anew") from None
    names = [name for name, value in settings.items() if found.settings.get(name) != value]
    if names:
        raise ConfigError(
            f"--resume: {file} was measured with other settings ({', '.join(names)}); give the same flags, or remove it"
        )
    return found.cells


def _at(asked: Asked, spec: TargetSpec, setting: str, value: float, batches: Sequence[int], folder: Path) -> list[Cell]:
    """One start."""
    assert asked.model is not None
    assert spec.recipe is not None
    common: dict[str, Any] = {
        "target": spec.name,
        "setting": setting.lstrip("-").replace("-", "_"),
        "value": value,
    }
    flags = [*cache_flags(spec.recipe, asked), *spec.flags, setting, f"{value:g}"]
    cells: list[Cell] = []
    try:
        log = folder / f"{spec.name}-{common['setting']}-{value:g}.log"
        with Launched(spec.recipe, asked.model, asked.model, flags, log) as launched:
            launched.wait_ready()
            target = TargetSettings(
                base_url=launched.url,
                model=asyncio.run(served_model(launched.url, asked.api_key, None)),
                route=asked.workload.route,
                api_key=asked.api_key,
                body={**SAMPLING, **asked.body},
                timeout=asked.timeout,
            )
            probed = asyncio.run(probe(target, asked.workload.input_len[1], Workload(asked.workload).count))
            workload = msgspec.structs.replace(asked.workload, word_cost=probed.word_cost)
            for batch in batches:
                cells.append(_loaded(launched, target, batch, workload, common))
    except NybbleError as error:
        state: State = "died" if cells else "no start"
        cells += [Cell(**common, batch=batch, state=state, detail=str(error)) for batch in batches[len(cells) :]]
    return cells


def _loaded(
    launched: Launched, target: TargetSettings, batch: int, workload: WorkloadSettings, common: dict[str, Any]
) -> Cell:
    if not launched.is_alive:
        return Cell(**common, batch=batch, state="died", detail=launched.last_words())
    results = ResultsFile("serve", None, {}, formulas={})
    run = ServeRun(target, workload, Plan(num_repeats=1, num_warmups=1), results, warn=lambda text: None)
    rows = list(run.measure([Point(num_prompts=2 * batch, concurrency=batch)]))
    row = rows[0] if rows else {}
    is_dead = run.has_died or not launched.is_healthy()
    num_failed = int(row.get("failed", 0)) + int(row.get("num_unsent", 0) or 0)
    return Cell(
        **common,
        batch=batch,
        state="died" if is_dead else "failed" if num_failed else "served",
        output_throughput=row.get("output_throughput"),
        num_failed=num_failed,
        preemptions=row.get("server", {}).get("preemptions"),
        peak_kv_cache_usage=row.get("server", {}).get("peak_kv_cache_usage"),
        detail="; ".join(
            [*run.failures[:1], *([f"the last that it said: {launched.last_words()}"] if is_dead else [])]
        ),
    )
