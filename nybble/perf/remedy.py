"""Whether a machine serves a load whole, within its objectives; `remedy`: which would, where that at hand does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from nybble.core.errors import ConfigError
from nybble.perf.machines import MACHINES, Machine
from nybble.perf.model_shape import ModelShape
from nybble.perf.planner import HALF, MOST_SEQS, STEP_TOKENS, Planner
from nybble.perf.roofline import Roofline
from nybble.perf.step_cost import Work
from nybble.perf.workload_model import (
    Load,
    expected_decode_seconds,
    expected_prefill_seconds,
    outcome,
    seqs_for_rate,
)

MOST_GAP = 4
"""TPOT objectives that one gap between tokens may last."""


def serves(roofline: Roofline, planner: Planner) -> bool:
    """Memory holds the load, and the objectives are kept under all of it."""
    load, most = planner.load, planner.most_seqs(roofline.shape)
    if load.request_rate is None:
        wanted = min(load.concurrency or 1, MOST_SEQS)
        needed = wanted if wanted <= most else None
    else:
        needed = seqs_for_rate(roofline, load, most)
    if needed is None or not outcome(roofline, load, needed).keeps(load):
        return False
    return is_short(load, needed, gap_ms(roofline, load, needed, planner.choices(needed)[0]))


def is_short(load: Load, num_seqs: int, gap_ms: float) -> bool:
    """Whether a step's length is one that the TPOT objective bears; nobody waits for a step of one alone."""
    return load.tpot_ms is None or num_seqs == 1 or gap_ms <= MOST_GAP * load.tpot_ms


def gap_ms(roofline: Roofline, load: Load, num_seqs: int, tokens: int) -> float:
    """What a step of so many tokens, those of `num_seqs` that decode and the rest a prompt's, takes."""
    context_len = load.input_len + (load.output_len + 1) // 2
    decode = expected_decode_seconds(roofline, Work.decode(num_seqs, context_len))
    return (decode + expected_prefill_seconds(roofline, tokens - num_seqs)) * 1e3


def divisions(shape: ModelShape) -> Iterator[tuple[int, ModelShape]]:
    """Numbers of devices among which the model can be divided, and one's part."""
    for devices in (1, 2, 4, 8, 16):
        with suppress(ConfigError):
            yield devices, shape.split_by(devices)


def remedy(shape: ModelShape, planner: Planner, devices: int) -> str:
    """In words.

    Args:
        shape: of the whole model.
        planner: of the machine at hand, and the load.
        devices: of that machine that were found not to serve it.
    """
    own, load = planner.machine, planner.load
    more = None if own.link_bytes_per_second is None else _fewest(shape, own, load, devices + 1)
    by_rate = sorted(MACHINES, key=lambda machine: machine.read_bytes_per_second)
    others = [(n, m.name) for m in by_rate if m.name != own.name and (n := _fewest(shape, m.sustained(), load, 1))]
    found = [*([(more, own.name)] if more else []), *sorted(others, key=lambda each: each[0])[:1]]
    whole = "this load whole" + ("" if load.ttft_ms is None and load.tpot_ms is None else ", within its objectives")
    if not found:
        return f"no machine of the table, nor up to 16 of one together, would serve {whole}"
    split = " (nybble itself runs on one device: a plan for engines that split)" if max(found)[0] > 1 else ""
    return f"{' or '.join(f'{n} × {name}' for n, name in found)} would serve {whole}{split}"


def _fewest(shape: ModelShape, machine: Machine, load: Load, least: int) -> int | None:
    """Of such machines, `least` at the least, that serve the load; None: up to 16 do not."""
    planner = Planner(machine, load, STEP_TOKENS)
    parts = ((devices, part) for devices, part in divisions(shape) if devices >= least)
    return next((devices for devices, part in parts if serves(Roofline(part, machine, HALF), planner)), None)
