"""`refine`: holds recommended settings against their neighbours in short runs on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from nybble.bench.offline import opened_model
from nybble.core.errors import MeasurementError, MemoryBudgetError
from nybble.perf.advice import Advice
from nybble.perf.planner import STEP_TOKENS
from nybble.perf.setting import Setting
from nybble.perf.trial import Trial, run_trial
from nybble.perf.workload_model import Load

WORTH = 1.03
"""A neighbour must be so many times as good to take a recommendation's place: less may be chance."""
MOST_TRIED = 5
"""The recommendation, and two neighbours in each of two settings."""
REFINED = ("max_num_batched_tokens", "max_num_seqs")
ENGINE_SETTINGS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
)


@dataclass(frozen=True)
class Tried:
    """One choice of settings, and what came of it, once for each repeat."""

    settings: Mapping[str, Any]
    trials: list[Trial]
    verdict: str = ""  # whether it was taken, and why

    @property
    def output_tok_s(self) -> float:
        return median(trial.output_tok_s for trial in self.trials)

    def keeps(self, load: Load) -> bool:
        return all(trial.keeps(load) for trial in self.trials)

    def is_better_than(self, other: Tried, load: Load) -> bool:
        """It keeps the objectives and the other does not; or both do, or neither, and it is faster by `WORTH`, in each
        repeat than in any of the other's."""
        if self.keeps(load) != other.keeps(load):
            return self.keeps(load)
        least, most = min(t.output_tok_s for t in self.trials), max(t.output_tok_s for t in other.trials)
        return least > most and self.output_tok_s >= WORTH * other.output_tok_s


def refine(
    model: str | None,
    synthetic: str | None,
    engine: Mapping[str, Any],
    advice: Advice,
    load: Load,
    *,
    num_requests: int,
    repeats: int,
    report: Callable[[Tried], None],
) -> tuple[list[Setting], list[Tried]]:
    """The settings with the best of what was tried, and all that was.

    First the tokens of a step, halved and doubled, then the sequences; each goes on from the best so far. A neighbour
    that does not fit, or breaks, becomes one of the advice's notes.

    Args:
        engine: settings that stay.
        report: is told of each as it is done.
    """
    names = [setting.name for setting in advice.settings if setting.name in ENGINE_SETTINGS]
    best_settings = {name: advice.value(name) for name in names}
    tried: dict[tuple[Any, ...], Tried] = {}

    def measure(settings: Mapping[str, Any]) -> Tried:
        key = tuple(settings.values())
        if key not in tried:
            with opened_model(model, synthetic, {**engine, **settings}) as llm:
                run_trial(llm, load, min(num_requests, 4), "warm-up")
                trials = [run_trial(llm, load, num_requests, f"repeat {index}") for index in range(repeats)]
            tried[key] = Tried(dict(settings), trials)
            report(tried[key])
        return tried[key]

    def judge(found: Tried, verdict: str) -> Tried:
        key = tuple(found.settings.values())
        tried[key] = replace(found, verdict=verdict)
        return tried[key]

    best = judge(measure(best_settings), "the recommendation")
    for name in REFINED:
        for value in _neighbours(name, best.settings, load):
            try:
                found = measure({**best.settings, name: value})
            except (MemoryBudgetError, MeasurementError) as error:
                advice.notes.append(f"{name} {value} was not measured: {error}")
                continue
            is_better = found.is_better_than(best, load)
            found = judge(found, f"{'taken' if is_better else 'not taken'}: {_against(found, best, load, name)}")
            best = found if is_better else best
    runs = list(tried.values())
    return [_measured(setting, best, runs, load) for setting in advice.settings], runs


def _neighbours(name: str, settings: Mapping[str, Any], load: Load) -> list[int]:
    value = settings[name]
    if name == "max_num_batched_tokens":
        return [each for each in (value // 2, value * 2) if settings["max_num_seqs"] < each <= max(*STEP_TOKENS, value)]
    most = load.concurrency or 2 * value
    return [each for each in (value // 2, value * 2) if 1 <= each <= min(most, settings["max_num_batched_tokens"])]


def chosen(settings: Sequence[Setting], tried: Sequence[Tried]) -> Tried:
    """What was measured with the settings as `refine` left them."""
    values = {setting.name: setting.value for setting in settings}
    return next(each for each in tried if all(each.settings[name] == values[name] for name in REFINED))


def _against(found: Tried, best: Tried, load: Load, name: str) -> str:
    """How it compares with the best so far, from which it differs in the setting `name`."""
    other = f"{name} {best.settings[name]}"
    if found.keeps(load) != best.keeps(load):
        return f"{'keeps' if found.keeps(load) else 'breaks'} the objectives, unlike {other}"
    gain = found.output_tok_s / best.output_tok_s - 1
    chance = gain > 0 and not found.is_better_than(best, load)
    return f"{gain:+.1%} against {other}{', which may be chance' if chance else ''}"


def _measured(setting: Setting, best: Tried, runs: Sequence[Tried], load: Load) -> Setting:
    """The setting as the runs, of which the first is of what was recommended, left it."""
    if setting.name not in REFINED:
        return setting
    name, value, why = setting.name, best.settings[setting.name], setting.why
    others = {run.settings[name]: run for run in runs if run.settings[name] != setting.value}
    if value != setting.value:
        why = f"measured: {best.output_tok_s:,.1f} tok/s against {runs[0].output_tok_s:,.1f} with {setting.value}"
        if best.keeps(load) and not runs[0].keeps(load):
            why += ", which breaks the objectives"
    elif others:
        breaking = {other for other, run in others.items() if best.keeps(load) and not run.keeps(load)}
        for found, what in ((set(others) - breaking, "brought no more"), (breaking, "broke the objectives")):
            why += f"; {' and '.join(map(str, sorted(found)))}, measured, {what}" if found else ""
    return Setting(name, value, why)
