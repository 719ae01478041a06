"""`StepBench`: a whole decode step of the engine: the device's time of it against the time that passes.

    device_ms   the step's CUDA graph, replayed between events (on a CPU: the model and the greedy choice)
    wall_ms     one turn of the engine's loop, `Engine.step`, with all sequences decoding
    host_loss   1 − device / wall: what scheduling, uploads and text cost on top

Prompts of random ids, no prefix cache, greedy, end-of-text ignored, as in `bench latency`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from typing import Any

from nybble.core.config import ResolvedConfig
from nybble.core.errors import MeasurementError
from nybble.core.sampling import SamplingParams
from nybble.engine.engine import Engine
from nybble.llm import LLM
from nybble.perf.ceilings import Ceilings
from nybble.perf.decode_ops import decode_ops, step_cost, step_shape
from nybble.runner.model_runner import ModelRunner

WARM_STEPS = 4


def tokens_needed(batch: int, context_len: int, num_steps: int, max_num_batched_tokens: int) -> int:
    """Most tokens that a sequence generates while others are still being read, warming up, and in `num_steps` steps."""
    room = max(1, max_num_batched_tokens - batch)  # for prompts, in a step where all others decode already
    return math.ceil(batch * context_len / room) + 1 + WARM_STEPS + num_steps + 2


class StepBench:
    """Runs on one engine, made for `max_model_len` ≥ context_len + tokens_needed(…)."""

    def __init__(self, llm: LLM, ceilings: Ceilings, context_len: int) -> None:
        assert isinstance(llm.engine.runner, ModelRunner), llm.engine.runner
        self._llm = llm
        self._engine: Engine = llm.engine
        self._runner: ModelRunner = llm.engine.runner
        self._ceilings = ceilings
        self._context_len = context_len
        self._open: list[str] = []
        self._shape = step_shape(llm.checkpoint, llm.config)

    def measure(self, batch: int, num_steps: int) -> dict[str, Any]:
        """One repeat.

        Raises:
            MeasurementError: the batch did not run whole, for instance because the KV cache holds less.
        """
        try:
            self._begin(batch, num_steps)
            wall = self._wall_seconds(batch, num_steps)
            device = statistics.median(self._runner.time_decode_step(batch, num_steps))
        finally:
            self._end()
        return self._result(batch, device, wall)

    def _begin(self, batch: int, num_steps: int) -> None:
        """Bring `batch` sequences to where all of them decode."""
        config, draw = self._llm.config, random.Random(f"step {batch}")
        vocab_size = self._runner.vocab_size
        length = tokens_needed(batch, self._context_len, num_steps, config.max_num_batched_tokens)
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, detokenize=False)
        for _ in range(batch):
            prompt = [draw.randrange(vocab_size) for _ in range(self._context_len)]
            request = self._llm.requests.from_prompt(prompt, params)
            self._engine.add(request)
            self._open.append(request.request_id)
        waiting = set(self._open)
        self._num_preemptions = self._engine.stats.num_preemptions
        while waiting:
            for delta in self._engine.step():
                if delta.finish_reason is not None:
                    raise MeasurementError(_why_not(batch, config, delta.error or "a sequence ended early"))
                waiting.discard(delta.request_id)
        for _ in range(WARM_STEPS):
            self._engine.step()

    def _wall_seconds(self, batch: int, num_steps: int) -> float:
        """Of one step, in a run of them; the device has one in flight at both ends."""
        begin = time.perf_counter()
        num_tokens = sum(len(delta.token_ids) for _ in range(num_steps) for delta in self._engine.step())
        seconds = (time.perf_counter() - begin) / num_steps
        preempted = self._engine.stats.num_preemptions - self._num_preemptions
        if num_tokens != batch * num_steps or preempted:
            why = f"{num_tokens} tokens came instead of {batch * num_steps}, {preempted} sequences were preempted"
            raise MeasurementError(_why_not(batch, self._llm.config, why))
        return seconds

    def _end(self) -> None:
        for request_id in self._open:
            self._engine.abort(request_id)
        self._open.clear()
        while self._engine.has_work:
            self._engine.step()

    def _result(self, batch: int, device: float, wall: float) -> dict[str, Any]:
        dtype = self._shape.dtype
        ops = decode_ops(self._shape, batch, self._context_len)
        cost = step_cost(ops, dtype)
        roofline = sum(op.calls * self._ceilings.seconds(op.cost(dtype)) for op in ops)
        return {
            "batch": batch,
            "context_len": self._context_len,
            "device_ms": device * 1e3,
            "wall_ms": wall * 1e3,
            "host_loss": 1 - device / wall,
            "tok_s": batch / wall,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "tb_s": cost.bytes / device / 1e12,
            "read_share": cost.bytes / device / self._ceilings.read_bytes_per_second,
            "roofline_ms": roofline * 1e3,
            "roofline_share": roofline / device,
        }


def _why_not(batch: int, config: ResolvedConfig, why: str) -> str:
    return (
        f"a batch of {batch} did not decode whole ({why}); give the KV cache more ({config.memory}), or a smaller batch"
    )
