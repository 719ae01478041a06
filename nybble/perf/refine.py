"""`refine`: holds recommended settings against their neighbours in short runs on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    @property
    def output_tok_s(self) -> float:
        return median(trial.output_tok_s for trial in self.trials)

    def keeps(self, load: Load) -> bool:
        return all(trial.keeps(load) for trial in self.trials)

    def is_better_than(self, other: Tried, load: Load) -> bool:
        """It keeps the objectives and the other does not; or both do, or neither, and it is faster by `WORTH`."""
        if self.keeps(load) != other.keeps(load):
            return self.keeps(load)
        return self.output_tok_s >= WORTH * other.output_tok_s


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

    best = measure(best_settings)
    for name in REFINED:
        for value in _neighbours(name, best.settings, load):
            try:
                found = measure({**best.settings, name: value})
            except (MemoryBudgetError, MeasurementError) as error:
                advice.notes.append(f"{name} {value} was not measured: {error}")
                continue
            if found.is_better_than(best, load):
                best = found
    runs = list(tried.values())
    return [_measured(setting, best, runs) for setting in advice.settings], runs


def _neighbours(name: str, settings: Mapping[str, Any], load: Load) -> list[int]:
    value = settings[name]
    if name == "max_num_batched_tokens":
        return [each for each in (value // 2, value * 2) if settings["max_num_seqs"] < each <= max(*STEP_TOKENS, value)]
    most = load.concurrency or 2 * value
    return [each for each in (value // 2, value * 2) if 1 <= each <= min(most, settings["max_num_batched_tokens"])]


def _measured(setting: Setting, best: Tried, runs: Sequence[Tried]) -> Setting:
    """The setting as the runs, of which the first is of what was recommended, left it."""
    if setting.name not in REFINED:
        return setting
    value, others = best.settings[setting.name], {run.settings[setting.name] for run in runs} - {setting.value}
    why = setting.why
    if value != setting.value:
        why = f"measured: {best.output_tok_s:,.1f} tok/s against {runs[0].output_tok_s:,.1f} with {setting.value}"
    elif others:
        why += f"; {' and '.join(map(str, sorted(others)))}, measured, brought no more"
    return Setting(setting.name, value, why)
