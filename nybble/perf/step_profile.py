"""`StepProfiler`: runs an engine's own steps at one batch and context, and says where their time went."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import cast

import torch

from nybble.core.errors import ConfigError, MeasurementError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.llm import LLM
from nybble.models.decoder import CausalLM
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
            ConfigError: they do not fit together.
            MeasurementError: one ended early.
        """
        config = self._llm.config
        total = WARM_STEPS + self._num_steps * (self._repeats + 1)
        prompt_len = max(1, context_len - total // 2)
        # The first to have its prompt behind it decodes while the others' are taken in.
        max_tokens = total + steps_ahead(batch, prompt_len, config.max_num_batched_tokens)
        if prompt_len + max_tokens > config.max_model_len:
            raise ConfigError(
                f"--context-len {context_len}: {prompt_len + max_tokens} tokens a sequence are needed to measure batch "
                f"{batch}, and max_model_len is {config.max_model_len}: lower the first or raise the second"
            )
        with self._running(batch, prompt_len, max_tokens):
            self._steps(WARM_STEPS)
            walls = [self._timed(lambda: self._steps(self._num_steps)) for _ in range(self._repeats)]
            watched = self._timed(lambda: self._watched(lambda: self._steps(self._num_steps)))
        context = prompt_len + total // 2
        return self._times("decode", Work.decode(batch, context), context, walls, watched, self._num_steps)

    def prefill(self, prompt_len: int) -> StepTimes:
        """The step that takes in a prompt whole.

        Raises:
            ConfigError: it is longer than one step may be.
        """
        if prompt_len > self._llm.config.max_num_batched_tokens:
            raise ConfigError(
                f"--prefill-len {prompt_len} is more than max_num_batched_tokens = "
                f"{self._llm.config.max_num_batched_tokens}, the most that one step takes"
            )

        def once() -> None:
            for _ in self._llm.run([self._request(f"prefill {random.random()}", prompt_len, 1)]):
                pass
            _wait(self._is_cpu)

        once()
        walls = [self._timed(once) for _ in range(self._repeats)]
        watched = self._timed(lambda: self._watched(once))
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

    def _timed(self, run: Callable[[], None]) -> float:
        _wait(self._is_cpu)
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def _watched(self, run: Callable[[], None]) -> None:
        with self._observer.watching():
            run()

    def _steps(self, count: int) -> None:
        for _ in range(count):
            for delta in self._llm.engine.step():
                if delta.finish_reason is not None:
                    raise MeasurementError(
                        f"a sequence ended while it was measured: {delta.error or delta.finish_reason}"
                    )
        _wait(self._is_cpu)

    @contextmanager
    def _running(self, batch: int, prompt_len: int, max_tokens: int) -> Iterator[None]:
        """`batch` sequences that have their prompts behind them."""
        engine = self._llm.engine
        requests = [self._request(f"decode {index}", prompt_len, max_tokens) for index in range(batch)]
        begin = engine.stats
        try:
            for request in requests:
                engine.add(request)
            waiting = {request.request_id for request in requests}
            while waiting:
                waiting -= {delta.request_id for delta in engine.step() if delta.token_ids}
                stats = engine.stats
                if stats.num_preemptions > begin.num_preemptions:
                    raise ConfigError(
                        f"{batch} sequences of {prompt_len + max_tokens} tokens do not fit in the KV cache of "
                        f"{stats.num_kv_blocks * self._llm.config.block_size} tokens: lower --batch-sizes or "
                        "--context-len, or give more KV memory"
                    )
            yield
        finally:
            for request in requests:
                engine.abort(request.request_id)
            while engine.has_work:
                engine.step()

    def _request(self, name: str, prompt_len: int, max_tokens: int) -> Request:
        draw = random.Random(f"profile {name}")
        ids = [draw.randrange(self._llm.runner.vocab_size) for _ in range(prompt_len)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        return self._llm.requests.from_prompt(ids, params)


def steps_ahead(batch: int, prompt_len: int, max_num_batched_tokens: int) -> int:
    """More steps than the first of a batch runs before the last has its prompt behind it."""
    return 2 * (-(-batch * prompt_len // max(1, max_num_batched_tokens - batch)) + 4)


def _part_times(blamed: list[Blamed], num_steps: int, scale: float) -> list[PartTime]:
    seconds: dict[tuple[str, Kind], float] = defaultdict(float)
    counts: dict[tuple[str, Kind], int] = defaultdict(int)
    for blame in blamed:
        key = blame.interval.part, blame.interval.kind
        seconds[key] += blame.seconds
        counts[key] += 1
    return [PartTime(*key, seconds[key] * scale / num_steps, counts[key] / num_steps) for key in seconds]


def _wait(is_cpu: bool) -> None:
    if not is_cpu:
        torch.cuda.synchronize()
