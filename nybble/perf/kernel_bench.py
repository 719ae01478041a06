"""`KernelBench`: each operation of a decode step on its own: how long, how near the ceilings, how exact.

    share = roofline / time of a call;  roofline = max(bytes / read ceiling, flops / math ceiling), both from `Op.cost`

Weights and KV caches are distinct for each call, as they are from layer to layer. Activations are the same for all: in
a step the operation before has just left them in the cache. So the share of operations on activations alone (norms,
rotary) may be above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nybble.core.errors import MeasurementError
from nybble.kernels.check import OPS, TOLERANCE, measure, prepare
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Impl
from nybble.perf.ceilings import Ceilings
from nybble.perf.decode_ops import DecodeOp, StepShape, decode_ops
from nybble.perf.timing import num_copies, time_calls

DISTINCT = ("weight", "key_cache", "value_cache")
CPU_CHECK_BATCH = 4  # a float64 product on a CPU takes long, and its kernels treat each row alike


@dataclass(frozen=True)
class Point:
    """What to measure: one implementation of one operation."""

    batch: int
    op: DecodeOp
    impl: Impl
    is_chosen: bool  # a model would bind it

    @property
    def label(self) -> str:
        return f"{self.op.name} × {self.batch}: {self.op.op}={self.impl.name}"


class KernelBench:
    def __init__(self, shape: StepShape, ceilings: Ceilings, context_len: int) -> None:
        self._shape = shape
        self._ceilings = ceilings
        self._context_len = context_len
        self._errors: dict[tuple[str, Any], float] = {}  # of a CPU, by implementation and case: one for all batch sizes

    def points(self, batches: list[int], names: list[str] | None = None, all_impls: bool = False) -> Iterator[Point]:
        """In the order in which a step runs them.

        Args:
            names: operations wanted, by place (`gate_up`) or by kind (`int4_linear`); None: all.
            all_impls: those too that support the shape but are not chosen (references apart).
        """
        device, dtype = self._shape.device, self._shape.dtype
        for batch in batches:
            for op in decode_ops(self._shape, batch, self._context_len):
                if names is not None and op.name not in names and op.op not in names:
                    continue
                chosen = self._shape.choose(op)
                yield Point(batch, op, chosen, True)
                if all_impls:
                    spec = op.spec(device, dtype)
                    others = [i for i in OPS[op.op].impls if i is not chosen and i.supports(spec) is None]
                    yield from (Point(batch, op, impl, False) for impl in others)

    def time(self, point: Point, repeats: int) -> list[dict[str, Any]]:
        """A result for each repeat.

        Raises:
            MeasurementError: the memory does not hold it, or it cannot be timed; says which operation.
        """
        try:
            calls = self._calls(point)
            timing = time_calls(calls, self._shape.device, repeats)
        except (torch.OutOfMemoryError, MeasurementError) as error:
            raise MeasurementError(f"{point.label}: {str(error).splitlines()[0]}") from error
        cost = point.op.cost(self._shape.dtype)
        roofline = self._ceilings.seconds(cost)
        is_memory = cost.bytes / self._ceilings.read_bytes_per_second >= roofline
        return [
            {
                "us": seconds * 1e6,
                "bytes": cost.bytes,
                "flops": cost.flops,
                "tb_s": cost.bytes / seconds / 1e12,
                "tflop_s": cost.flops / seconds / 1e12,
                "roofline_us": roofline * 1e6,
                "share": roofline / seconds,
                "bound": "memory" if is_memory else "math",
                "calls_per_step": point.op.calls,
                "num_copies": len(calls),
            }
            for seconds in timing.seconds
        ]

    def error(self, point: Point) -> float:
        """‖result − float64 reference‖ / ‖reference‖ of the same shape; on a CPU with few tokens, once a shape."""
        shape, op = self._shape, point.op
        if shape.device.type != "cpu":
            return measure(op.op, point.impl.name, op.case, shape.dtype, shape.device)
        key = (point.impl.name, self._small_case(point))
        if key not in self._errors:
            self._errors[key] = measure(op.op, *key, shape.dtype, shape.device)
        return self._errors[key]

    def _small_case(self, point: Point) -> Any:
        """Of the same place in a step of fewer tokens. A name is not enough: layers may be stored in several ways."""
        timed, small = (
            decode_ops(self._shape, batch, self._context_len)
            for batch in (point.batch, min(point.batch, CPU_CHECK_BATCH))
        )
        return small[timed.index(point.op)].case

    @property
    def tolerance(self) -> float:
        """The largest error that is rounding."""
        return TOLERANCE[self._shape.dtype]

    def _calls(self, point: Point) -> list[Callable[[], object]]:
        device, dtype, case = self._shape.device, self._shape.dtype, point.op.case

        def arguments(seed: int) -> dict[str, Any]:
            found: dict[str, Any] = case.arguments(device, dtype, torch.Generator(device).manual_seed(seed))
            return found

        first = arguments(0)
        copies = num_copies(sum(_nbytes(first[name]) for name in DISTINCT if name in first), device)
        prepare(point.impl, case, first)
        calls: list[Callable[[], object]] = [partial(point.impl.launch, *first.values())]
        for seed in range(1, copies):
            other = arguments(seed)
            prepare(point.impl, case, other)
            # Block tables go with the caches they were drawn for.
            kept = {name: value for name, value in first.items() if name not in (*DISTINCT, "block_tables")}
            calls.append(partial(point.impl.launch, *(other | kept).values()))
        return calls


def _nbytes(value: torch.Tensor | Int4Weight) -> int:
    if isinstance(value, Int4Weight):
        return value.qweight.nbytes + value.scales.nbytes + value.zeros.nbytes
    return value.nbytes


def names_of(shape: StepShape) -> list[str]:
    """What `--ops` takes."""
    ops = decode_ops(shape, 1, 1)
    return list(dict.fromkeys([op.name for op in ops] + [op.op for op in ops]))
