"""`StepProfiler`: runs an engine's own steps at one batch and context, and says where their time went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import cast

import torch

from nybble.llm import LLM
from nybble.models.decoder import CausalLM
from nybble.perf.decoding import decoding, random_request, run_steps, steps_ahead
from nybble.perf.intervals import Blamed, Interval
from nybble.perf.observe import CpuObserver, GpuObserver, Observer
from nybble.perf.step_cost import Kind, Work

LAYER_LINEARS = ("qkv", "o", "gate_up", "down")
WARM_STEPS = 3


@dataclass(frozen=True)
class PartTime:
    """Seconds and launches of one part in one step."""

    part: str
    kind: Kind
    seconds: float
    count: float


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One kind of step, measured."""

    name: str  # decode or prefill
    work: Work
    context_len: int
    wall_seconds: list[float]  # of one step, a repeat each, nobody watching
    parts: list[PartTime]
    intervals: list[Interval] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return median(self.wall_seconds)

    @property
    def host_seconds(self) -> float:
        """Of a step's wall time, what no part accounts for: the host's scheduling and staging that nothing hides."""
        return max(0.0, self.seconds - sum(part.seconds for part in self.parts))


class StepProfiler:
    """On one engine, which must have no other work.

    Args:
        num_steps: of each repeat.
    """

    def __init__(self, llm: LLM, *, num_steps: int, repeats: int) -> None:
        self._llm = llm
        self._num_steps, self._repeats = num_steps, repeats
        self._is_cpu = llm.config.device == "cpu"
        model = cast(CausalLM, llm.runner.model)
        self._observer: Observer = (
            CpuObserver(model, llm.runner) if self._is_cpu else GpuObserver(LAYER_LINEARS, model.config.num_layers)
        )

    def decode(self, batch: int, context_len: int) -> StepTimes:
        """Steps of `batch` sequences of about `context_len` tokens, one new token each.

        Raises:
            ConfigError: they are longer than max_model_len together with what is decoded.
            KVMemoryError: they do not fit in the KV cache.
            MeasurementError: one ended early.
        """
        total = steps_needed(self._num_steps, self._repeats)
        prompt_len = prompt_len_for(context_len, total)
        with decoding(self._llm, batch, prompt_len, total):
            run = partial(run_steps, self._llm, self._num_steps, batch)
            run_steps(self._llm, WARM_STEPS, batch)
            walls = [_timed(run) for _ in range(self._repeats)]  # a step is in flight at both ends
            watched = self._watched(run)
        context = prompt_len + total // 2
        return self._times("decode", Work.decode(batch, context), context, walls, watched, self._num_steps)

    def prefill(self, prompt_len: int) -> StepTimes:
        """The step that takes in a prompt whole; it may not be longer than one."""
        assert prompt_len <= self._llm.config.max_num_batched_tokens, prompt_len

        def once() -> None:
            for _ in self._llm.run([random_request(self._llm, "prefill", prompt_len, 1)]):
                pass

        once()
        walls = [_timed(once) for _ in range(self._repeats)]
        watched = self._watched(once)
        return self._times("prefill", Work.prefill(prompt_len), prompt_len, walls, watched, 1)

    def _times(
        self, name: str, work: Work, context_len: int, walls: list[float], watched: float, num_steps: int
    ) -> StepTimes:
        blamed = [blame for blame in self._observer.blamed(num_steps) if blame.interval.kind != "host gaps"]
        # A GPU does not notice the profiler, only the host does. A CPU's timers slow what they time: the watched steps
        # give the shares, the others the time.
        scale = median(walls) / watched if self._is_cpu else 1.0
        return StepTimes(
            name=name,
            work=work,
            context_len=context_len,
            wall_seconds=[seconds / num_steps for seconds in walls],
            parts=_part_times(blamed, num_steps, scale),
            intervals=[blame.interval for blame in blamed],
        )

    def _watched(self, run: Callable[[], None]) -> float:
        """Seconds of it, all that it brought about included."""
        with self._observer.watching():
            begin = time.perf_counter()
            run()
            if not self._is_cpu:
                torch.cuda.synchronize()
            return time.perf_counter() - begin


def steps_needed(num_steps: int, repeats: int) -> int:
    """That `decode` runs."""
    return WARM_STEPS + num_steps * (repeats + 1)


def prompt_len_for(context_len: int, total_steps: int) -> int:
    """Half of the steps lie before the context that is asked for."""
    return max(1, context_len - total_steps // 2)


def tokens_needed(batch: int, context_len: int, total_steps: int, max_num_batched_tokens: int) -> int:
    """Of a sequence at its end, at most, in `decode`."""
    prompt_len = prompt_len_for(context_len, total_steps)
    return prompt_len + total_steps + steps_ahead(batch, prompt_len, max_num_batched_tokens)


def _timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _part_times(blamed: list[Blamed], num_steps: int, scale: float) -> list[PartTime]:
    seconds: dict[tuple[str, Kind], float] = defaultdict(float)
    counts: dict[tuple[str, Kind], int] = defaultdict(int)
    for blame in blamed:
        key = blame.interval.part, blame.interval.kind
        seconds[key] += blame.seconds
        counts[key] += 1
    return [PartTime(*key, seconds[key] * scale / num_steps, counts[key] / num_steps) for key in seconds]
