"""What a profile found, as one document: each step's parts against their floors, and what follows for other batches.

Steps are measured, or (a dry run) drawn from the roofline alone; then what is measured is None everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nybble.bench.environment import environment
from nybble.bench.results import SCHEMA, to_json
from nybble.core.errors import ConfigError
from nybble.perf.roofline import Floor, Roofline, by_kind
from nybble.perf.step_cost import KINDS, Kind, Work
from nybble.perf.step_profile import PartTime, StepTimes

NEITHER_BELOW = 0.5
"""Share of the floor below which neither reading nor computing binds a measured step: most of its time would remain on
a machine of infinite rates. Overheads do: launches, the host, kernels that are slower than their rooflines."""
FORMULAS = {
    "floor": "Σ over parts of max(bytes / read rate, operations / math rate)",
    "share": "a kind's part of the step's time",
    "of floor": "floor / measured: 100 % is the machine's limit",
    "bound by": "what most of the floor waits on; neither of them where the floor is less than "
    f"{NEITHER_BELOW:.0%} of the step: overheads decide (launches, the host, kernels below their rooflines)",
    "host gaps": "a step's wall time during which the device had nothing of it to do",
    "crossover": "the batch from which computing the weights' products takes longer than reading the weights",
}
PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """KV memory on one device, and where the figure comes from."""

    kv_tokens: int
    source: str


def step_row(name: str, work: Work, context_len: int, roofline: Roofline, times: StepTimes | None) -> dict[str, Any]:
    """One step: totals, kinds and parts."""
    floors = roofline.floors(work)
    parts = _parts(floors, {} if times is None else _by_name(times.parts, floors))
    floor_seconds = sum(floor.seconds for floor in floors)
    seconds = floor_seconds if times is None else times.seconds
    host = None if times is None else times.host_seconds
    bound_seconds: dict[str, float] = defaultdict(float)
    for floor in floors:
        bound_seconds[floor.bound] += floor.seconds
    tokens = work.num_sequences if name == "decode" else work.num_tokens
    bound = max(bound_seconds, key=lambda bound: bound_seconds[bound])
    return {
        "step": name,
        "batch": work.num_sequences,
        "tokens": work.num_tokens,
        "context_len": context_len,
        "wall_ms": None if times is None else times.seconds * 1e3,
        "wall_ms_spread": None if times is None else [min(times.wall_seconds) * 1e3, max(times.wall_seconds) * 1e3],
        "floor_ms": floor_seconds * 1e3,
        "tok_s": None if times is None else tokens / times.seconds,
        "limit_tok_s": tokens / floor_seconds,
        "of_floor": None if times is None else floor_seconds / times.seconds,
        "bytes": sum(floor.part.num_bytes for floor in floors),
        "flops": sum(floor.part.flops for floor in floors),
        "bound": "neither" if floor_seconds < NEITHER_BELOW * seconds else bound,
        "floor_bound": bound,
        "kinds": _kinds(parts, host, seconds),
        "parts": parts,
    }


def _by_name(parts: Sequence[PartTime], floors: Sequence[Floor]) -> dict[str, PartTime]:
    """Where all other products are known by name, dense kernels are the output layer's."""
    found = {part.part: part for part in parts}
    products = {floor.part.name for floor in floors if floor.part.kind == "weight GEMMs"}
    if "dense" in found and products - set(found) == {"lm_head"}:
        found["lm_head"] = found.pop("dense")
    return found


def _parts(floors: Sequence[Floor], measured: dict[str, PartTime]) -> list[dict[str, Any]]:
    rows = []
    for floor in floors:
        found = measured.pop(floor.part.name, None)
        rows.append(
            {
                "part": floor.part.name,
                "kind": floor.part.kind,
                "count": floor.part.count,
                "bytes": floor.part.num_bytes,
                "flops": floor.part.flops,
                "floor_ms": floor.seconds * 1e3,
                "bound": floor.bound,
                "measured_ms": None if found is None else found.seconds * 1e3,
            }
        )
    for name, part in measured.items():
        rows.append(
            {"part": name, "kind": part.kind, "count": part.count, "bytes": None, "flops": None}
            | {"floor_ms": None, "bound": None, "measured_ms": part.seconds * 1e3}
        )
    return rows


def _kinds(parts: Sequence[Mapping[str, Any]], host_seconds: float | None, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        own = [part for part in parts if part["kind"] == kind]
        measured = [part["measured_ms"] for part in own if part["measured_ms"] is not None]
        floor_ms = sum(part["floor_ms"] or 0.0 for part in own)
        measured_ms = sum(measured) if measured else None
        if kind == "host gaps" and host_seconds is not None:
            measured_ms = host_seconds * 1e3
        if not own and measured_ms is None:
            continue
        is_measured = host_seconds is not None
        shown_ms = (measured_ms or 0.0) if is_measured else floor_ms
        bounds: dict[Any, float] = defaultdict(float)
        for part in own:
            if part["bound"] is not None:
                bounds[part["bound"]] += part["floor_ms"]
        rows.append(
            {
                "kind": kind,
                "measured_ms": measured_ms,
                "floor_ms": floor_ms,
                "share": shown_ms / (seconds * 1e3),
                "of_floor": floor_ms / measured_ms if measured_ms and floor_ms else None,
                "bytes": sum(part["bytes"] or 0 for part in own),
                "flops": sum(part["flops"] or 0 for part in own),
                "bound": max(bounds, key=lambda bound: bounds[bound]) if bounds else None,
            }
        )
    return rows


def larger_batches(rows: Sequence[Mapping[str, Any]], roofline: Roofline, capacity: Capacity) -> list[dict[str, Any]]:
    """What the model says of batches beyond the largest: the limit, what comes of it if the largest's share of the
    limit holds (None if nothing was measured), and whether such a batch's sequences fit in KV memory."""
    decode = [row for row in rows if row["step"] == "decode"]
    if not decode:
        return []
    last = max(decode, key=lambda row: (row["batch"], row["context_len"]))
    found = []
    for factor in (2, 4, 8):
        batch, context_len = last["batch"] * factor, last["context_len"]
        limit = roofline.decode_tok_s(batch, context_len)
        found.append(
            {
                "batch": batch,
                "context_len": context_len,
                "fits": batch * context_len <= capacity.kv_tokens,
                "limit_tok_s": limit,
                "expected_tok_s": None if last["of_floor"] is None else limit * last["of_floor"],
                "gain_over_half": limit / roofline.decode_tok_s(batch // 2, context_len),
            }
        )
    return found


def eight_bit_kv(row: Mapping[str, Any], roofline: Roofline) -> dict[str, Any]:
    """What a KV cache of 8 bits would bring a decode step: tokens in the same memory, ms off the floor of attention."""
    work, narrow = Work.decode(row["batch"], row["context_len"]), replace(roofline, kv_itemsize=1)
    seconds, narrow_seconds = (by_kind(each.floors(work))["attention"] for each in (roofline, narrow))
    return {
        "times_as_many_tokens": roofline.kv_bytes_per_token() // narrow.kv_bytes_per_token(),
        "spared_ms": (seconds - narrow_seconds) * 1e3,
    }


def communication_rows(whole: Roofline, batches: Sequence[int], context_len: int) -> list[dict[str, Any]]:
    """By tensor-parallel size, from the machine's link: the least that exchanging takes, and what splitting gains."""
    rows = []
    for devices in PARALLEL:
        try:
            split = Roofline(whole.shape.split_by(devices), whole.machine, whole.dtype, whole.kv_itemsize)
        except ConfigError:
            continue
        for batch in batches:
            floors = split.floors(Work.decode(batch, context_len))
            total = sum(floor.seconds for floor in floors)
            link = sum(floor.seconds for floor in floors if floor.part.kind == "communication")
            single = whole.decode_tok_s(batch, context_len)
            rows.append(
                {
                    "num_devices": devices,
                    "batch": batch,
                    "context_len": context_len,
                    "floor_ms": total * 1e3,
                    "communication_ms": link * 1e3,
                    "share": link / total,
                    "speed_up": batch / total / single,
                }
            )
    return rows


def make_document(
    *,
    settings: Mapping[str, Any],
    whole: Roofline,
    roofline: Roofline,
    rows: Sequence[Mapping[str, Any]],
    capacity: Capacity,
    facts: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that is shown.

    Args:
        whole: the model on one device; `roofline` as it is run, which differs in tensor parallel.
        facts: more that belongs at the top.
        warnings: where the rows are not all that was asked for.
    """
    shape = roofline.shape
    decode = [row for row in rows if row["step"] == "decode"]
    batches = sorted({row["batch"] for row in decode})
    context_len = max((row["context_len"] for row in decode), default=1)
    dequantize = roofline.dequantize_seconds()
    document = {
        "schema": SCHEMA,
        "benchmark": "profile",
        "complete": True,
        "environment": environment(),
        "settings": settings,
        "machine": asdict(roofline.machine),
        "num_devices": shape.num_devices,
        "model": {
            "num_weights": whole.shape.num_weights,
            "num_quantized_weights": whole.shape.num_quantized_weights,
            "weight_bytes_per_device": shape.weight_bytes(roofline.dtype.itemsize),
            "kv_bytes_per_token_per_device": roofline.kv_bytes_per_token(),
        },
        "crossover_batch": roofline.crossover_batch(),
        "dequantize_ms": None if dequantize is None else dequantize * 1e3,
        "capacity": asdict(capacity),
        "eight_bit_kv": eight_bit_kv(decode[-1], roofline) if decode else None,
        **facts,
        "warnings": warnings,
        "steps": rows,
        "larger_batches": larger_batches(rows, roofline, capacity),
        "communication": []
        if whole.machine.link_bytes_per_second is None
        else communication_rows(whole, batches, context_len),
        "formulas": FORMULAS,
    }
    return dict(to_json(document))


def share_of(row: Mapping[str, Any], kind: Kind) -> float:
    """A kind's share of a step; 0 where it has none."""
    return next((each["share"] for each in row["kinds"] if each["kind"] == kind), 0.0)


def step_name(row: Mapping[str, Any]) -> str:
    if row["step"] == "decode":
        return f"decode {row['batch']} at {row['context_len']:,}"
    return f"prefill {row['tokens']:,}"
