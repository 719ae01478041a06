"""`advise`: the settings that matter for a model, a machine and a load, each with its reason in figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nybble.core.errors import ConfigError
from nybble.perf.machines import Machine, check_link
from nybble.perf.memory_advice import choose_bytes, choose_utilization, entry_count, kv_dtype
from nybble.perf.memory_model import MemoryPlan
from nybble.perf.model_shape import ModelShape
from nybble.perf.planner import CPU_STEP_TOKENS, HALF, MOST_SEQS, STEP_TOKENS, Planner
from nybble.perf.remedy import MOST_GAP, divisions, gap_ms, is_short, remedy, serves
from nybble.perf.roofline import Roofline
from nybble.perf.setting import Setting
from nybble.perf.workload_model import (
    Load,
    Outcome,
    expected_prefill_seconds,
    most_seqs,
    outcome,
    seqs_for_rate,
)

GOOD_RATE = 0.95
"""Of the best prefill rate: from there on, longer steps bring little."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to set, what to expect of it, and what else was looked at."""

    settings: list[Setting]
    num_devices: int
    expected: Outcome
    limit: Outcome
    memory: MemoryPlan
    by_seqs: list[tuple[Outcome, Outcome, bool]]  # other numbers of sequences: expected, limit, whether their KV fits
    notes: list[str] = field(default_factory=list)

    def of(self, num_seqs: int) -> tuple[Outcome, Outcome]:
        """Expected and limit of a number of sequences that was looked at."""
        return next((each, limit) for each, limit, _ in self.by_seqs if each.num_seqs == num_seqs)

    def value(self, name: str) -> Any:
        return next(setting.value for setting in self.settings if setting.name == name)


def advise(shape: ModelShape, machine: Machine, load: Load, num_devices: int = 1, *, on_gpu: bool = True) -> Advice:
    """Recommend settings.

    Args:
        shape: of the whole model.
        num_devices: how many such machines there are.
        on_gpu: else memory is asked for in bytes, and steps are small.

    Raises:
        ConfigError: the model does not fit; says how many devices it would take. Or a request is longer than it takes,
            or nothing is known of the devices' link.
    """
    check_link(machine, num_devices)
    _check_length(shape, load)
    machine = machine.sustained()
    planner = Planner(machine, load, STEP_TOKENS if on_gpu else CPU_STEP_TOKENS)
    devices, roofline = _choose_devices(shape, planner, num_devices)
    most_fitting = _most_fitting(shape, roofline.shape, planner)
    notes: list[str] = []
    num_seqs, why = _choose_seqs(roofline, load, most_fitting, notes)
    budget = _choose_step_tokens(roofline, planner, num_seqs, notes)
    if not serves(roofline, planner):
        notes.append(remedy(shape, planner, devices))
    plan = planner.plan(roofline.shape, num_seqs, budget.value)
    if on_gpu:
        memory = [choose_utilization(plan, load, num_seqs), entry_count(plan, load, num_seqs)]
    else:
        memory = [choose_bytes(plan, load, num_seqs)]
    settings = [
        _devices_setting(devices, num_devices, plan, load),
        Setting("max_num_seqs", num_seqs, why),
        budget,
        Setting(
            "max_model_len", load.tokens, f"{load.input_len} + {load.output_len} tokens; longer requests are refused"
        ),
        *memory,
        kv_dtype(roofline, plan, load, num_seqs),
    ]
    return Advice(
        settings=settings,
        num_devices=devices,
        expected=outcome(roofline, load, num_seqs),
        limit=outcome(roofline, load, num_seqs, is_expected=False),
        memory=plan,
        by_seqs=[
            (outcome(roofline, load, n), outcome(roofline, load, n, is_expected=False), n <= most_fitting)
            for n in sorted({1, 4, 16, 64, 256, num_seqs // 2, num_seqs, num_seqs * 2} - {0})
        ],
        notes=notes,
    )


def _choose_devices(shape: ModelShape, planner: Planner, num_devices: int) -> tuple[int, Roofline]:
    """The fewest devices that hold the load and keep its objectives; else the most there are that fit the model.

    Raises:
        ConfigError: none fit it.
    """
    machine = planner.machine
    fitting = {n: part for n, part in divisions(shape) if planner.plan(part, 1).most_kv_tokens}
    given = [n for n in fitting if n <= num_devices]
    for devices in given:
        roofline = Roofline(fitting[devices], machine, HALF)
        if serves(roofline, planner) or devices == given[-1]:
            return devices, roofline
    enough = min(fitting, default=None)
    remedy = "no number of them up to 16 does" if enough is None else f"{enough} of them do: --num-devices {enough}"
    raise ConfigError(
        f"the model's {shape.weight_bytes(HALF.itemsize) / 1e9:.1f} GB of weights, with room for a step and the KV "
        f"cache, do not fit on {num_devices} × {machine.name} of {machine.memory_bytes / 1e9:.0f} GB; {remedy}"
    )


def _check_length(shape: ModelShape, load: Load) -> None:
    """Raises ConfigError: a request is longer than the model takes, on however many devices."""
    positions = shape.config.max_position_embeddings
    if load.tokens > positions:
        raise ConfigError(
            f"--input-len {load.input_len} and --output-len {load.output_len} make {load.tokens} tokens, more than the "
            f"model's {positions} positions"
        )


def _most_fitting(shape: ModelShape, part: ModelShape, planner: Planner) -> int:
    """Sequences at once that memory holds.

    Args:
        part: one device's of the whole `shape`.

    Raises:
        ConfigError: not even one; says how many devices it would take.
    """
    most = planner.most_seqs(part)
    if most == 0:
        room = planner.plan(part, 1).most_kv_tokens
        enough = next((devices for devices, part in divisions(shape) if planner.most_seqs(part)), None)
        remedy = "no number of them up to 16 does" if enough is None else f"{enough} do: --num-devices {enough}"
        raise ConfigError(
            f"a request of {planner.load.tokens} tokens does not fit: there is room for {room} tokens of KV on "
            f"{part.num_devices} × {planner.machine.name}; {remedy}, or give shorter lengths"
        )
    return most


def _choose_seqs(roofline: Roofline, load: Load, most: int, notes: list[str]) -> tuple[int, str]:
    """As many as are asked for, as fit, and as keep the objectives."""
    wanted, why = (
        _wanted_by_rate(roofline, load, most, notes) if load.request_rate else _wanted_at_once(load, most, notes)
    )
    keeping = most_seqs(roofline, load, wanted)
    if keeping == wanted:
        return wanted, why
    if keeping == 0:
        alone = outcome(roofline, load, 1)
        notes.append(
            f"the objectives cannot be kept: a single sequence takes about TTFT {alone.ttft_ms:.3g} ms, TPOT "
            f"{alone.tpot_ms:.3g} ms"
        )
        return wanted, why
    kept = outcome(roofline, load, keeping)
    if load.request_rate is not None and kept.requests_per_second < load.request_rate:
        notes.append(
            f"the objectives forbid {load.request_rate:g} requests a second: {keeping} at once keep them, and serve "
            f"about {kept.requests_per_second:.3g} a second at the most"
        )
    else:
        notes.append(
            f"{keeping} at once keep the objectives, {wanted} would not: more than {keeping} wait in the queue"
        )
    return keeping, f"the most that keep TPOT near {kept.tpot_ms:.3g} ms and TTFT near {kept.ttft_ms:.3g} ms"


def _wanted_at_once(load: Load, most: int, notes: list[str]) -> tuple[int, str]:
    assert load.concurrency is not None
    if load.concurrency <= most:
        return (
            load.concurrency,
            "the one stream" if load.concurrency == 1 else f"all {load.concurrency} streams at once",
        )
    notes.append(f"{load.concurrency - most} of {load.concurrency} streams wait at any time, up to a request's life")
    holds = "at most" if most == MOST_SEQS else "the KV cache holds"
    return most, f"{holds} {most} of {load.concurrency} streams; the others wait"


def _wanted_by_rate(roofline: Roofline, load: Load, most: int, notes: list[str]) -> tuple[int, str]:
    needed = seqs_for_rate(roofline, load, most)
    if needed is not None:  # arrivals are random: twice the mean number is seldom too little
        return min(
            2 * needed, most
        ), f"about {needed} run at {load.request_rate:g} requests a second; twice that for bursts"
    rate = outcome(roofline, load, most).requests_per_second
    notes.append(
        f"{load.request_rate:g} requests a second are more than this machine serves (about {rate:.3g} with {most} at "
        "once): the queue would grow without end"
    )
    return most, f"as many as fit; they serve about {rate:.3g} of {load.request_rate:g} requests a second"


def _choose_step_tokens(roofline: Roofline, planner: Planner, num_seqs: int, notes: list[str]) -> Setting:
    """The step that carries a prompt's chunk is longer, for all who decode in it."""
    load, choices = planner.load, planner.choices(num_seqs)
    gaps_ms = {tokens: gap_ms(roofline, load, num_seqs, tokens) for tokens in choices}
    rates = {tokens: tokens / expected_prefill_seconds(roofline, tokens) for tokens in choices}
    best = max(rates.values())
    fast = next(tokens for tokens in choices if rates[tokens] >= GOOD_RATE * best)
    why = "prompts go in at {rate:.0%} of the best rate; a step with one takes about {gap:.3g} ms"
    holding = [tokens for tokens in choices if planner.holds(roofline.shape, num_seqs, tokens)] or choices[:1]
    if fast > holding[-1]:
        fast = holding[-1]
        why += "; longer ones leave too little memory for keys and values"
    kept = [tokens for tokens in choices if is_short(load, num_seqs, gaps_ms[tokens])]
    if fast not in kept:
        fast = kept[-1] if kept else choices[0]
        longer = "longer ones" if kept else "even this shortest one"
        why += f"; {longer} would hold others up for more than {MOST_GAP} times the TPOT objective"
        if not kept:
            notes.append(
                f"even the shortest step that takes in a prompt, {fast} tokens, holds up all who decode for about "
                f"{gaps_ms[fast]:.3g} ms, more than {MOST_GAP} times the TPOT objective"
            )
    return Setting("max_num_batched_tokens", fast, why.format(rate=rates[fast] / best, gap=gaps_ms[fast]))


def _devices_setting(devices: int, num_devices: int, plan: MemoryPlan, load: Load) -> Setting:
    why = f"{plan.weight_bytes / 1e9:.3g} GB of weights a device leave room for {plan.most_kv_tokens:,} tokens of KV"
    if devices < num_devices:
        why += f"; {num_devices // devices} such engines side by side serve more than one across {num_devices} devices"
    if devices > 1:
        why += "; nybble itself runs on one device, so this is a plan for engines that split"
    return Setting("tensor_parallel_size", devices, why)
