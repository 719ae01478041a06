"""`StepBench`: a whole decode step of the engine: the device's time of it against the time that passes.

    device_ms   the step's CUDA graph, replayed between events (on a CPU: the model and the greedy choice)
    wall_ms     one turn of the engine's loop, `Engine.step`, with all sequences decoding
    host_loss   1 − device / wall: what scheduling, uploads and text cost on top

Prompts of random ids, no prefix cache, greedy, end-of-text ignored, as in `bench latency`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from nybble.llm import LLM
from nybble.perf.ceilings import Ceilings
from nybble.perf.decoding import decoding, run_steps, steps_ahead
from nybble.perf.machines import Machine
from nybble.perf.model_shape import read_checkpoint
from nybble.perf.roofline import Roofline
from nybble.perf.step_cost import Work

WARM_STEPS = 4


def tokens_needed(batch: int, context_len: int, num_steps: int, max_num_batched_tokens: int) -> int:
    """Most tokens that a sequence generates while others are still being read, warming up, and in `num_steps` steps."""
    return WARM_STEPS + num_steps + steps_ahead(batch, context_len, max_num_batched_tokens)


class StepBench:
    """Runs on one engine, made for `max_model_len` ≥ context_len + tokens_needed(…)."""

    def __init__(self, llm: LLM, ceilings: Ceilings, context_len: int) -> None:
        self._llm = llm
        self._context_len = context_len
        machine = Machine(
            name="this",
            memory_bytes=0,
            read_bytes_per_second=ceilings.read_bytes_per_second,
            flops_per_second=ceilings.flops_per_second,
            is_measured=True,
        )
        self._roofline = Roofline(read_checkpoint(llm.checkpoint), machine, getattr(torch, llm.config.dtype))

    def measure(self, batch: int, num_steps: int) -> dict[str, Any]:
        """One repeat.

        Raises:
            ConfigError: the KV cache is too small for the batch.
            MeasurementError: a sequence ended early.
        """
        with decoding(self._llm, batch, self._context_len, WARM_STEPS + num_steps):
            run_steps(self._llm, WARM_STEPS, batch)
            begin = time.perf_counter()
            run_steps(self._llm, num_steps, batch)  # the device has one in flight at both ends
            wall = (time.perf_counter() - begin) / num_steps
            device = statistics.median(self._llm.runner.time_decode_step(batch, num_steps))
        return self._result(batch, device, wall)

    def _result(self, batch: int, device: float, wall: float) -> dict[str, Any]:
        floors = self._roofline.floors(Work.decode(batch, self._context_len))
        num_bytes = sum(floor.part.num_bytes for floor in floors)
        roofline = sum(floor.seconds for floor in floors)
        return {
            "batch": batch,
            "context_len": self._context_len,
            "device_ms": device * 1e3,
            "wall_ms": wall * 1e3,
            "host_loss": 1 - device / wall,
            "tok_s": batch / wall,
            "bytes": num_bytes,
            "flops": sum(floor.part.flops for floor in floors),
            "tb_s": num_bytes / device / 1e12,
            "read_share": num_bytes / device / self._roofline.machine.read_bytes_per_second,
            "roofline_ms": roofline * 1e3,
            "roofline_share": roofline / device,
        }
