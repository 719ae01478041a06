"""What ran on the device during some steps, as intervals: by the profiler on a GPU, by timers on a CPU.

Neither changes what runs. The GPU's kernels are told apart by their names, since a captured graph has no other trace of
who launched them; the CPU's operations by the layers that call them.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch

from nybble.kernels.check import OPS
from nybble.models.decoder import CausalLM
from nybble.perf.intervals import Blamed, Interval, blame_nested, blame_queued
from nybble.perf.step_cost import Kind
from nybble.runner.model_runner import ModelRunner

KIND_OF_OP: dict[str, Kind] = {
    "attention": "attention",
    "dense_linear": "weight GEMMs",
    "int4_gated": "weight GEMMs",
    "int4_linear": "weight GEMMs",
    "int4_qkv": "weight GEMMs",
    "kv_write": "KV writes",
    "rms_norm": "norms and activations",
    "rotary": "norms and activations",
    "silu_mul": "norms and activations",
}

KERNELS: tuple[tuple[str, str, Kind], ...] = (
    (r"dequantize", "dequantize", "dequantization"),
    (r"w4a16|int4_linear_kernel|sum_parts_kernel", "int4", "weight GEMMs"),
    (r"nvjet|gemm|gemv|cutlass|cublas|splitk", "dense", "weight GEMMs"),
    (r"attention_decode|decode_kernel|join_kernel|prefill_kernel|flash|fmha", "attention", "attention"),
    (r"kv_write_kernel", "kv_write", "KV writes"),
    (r"rms_norm_kernel", "rms_norm", "norms and activations"),
    (r"rotary_kernel", "rotary", "norms and activations"),
    (r"silu_mul_kernel", "silu_mul", "norms and activations"),
    (r"nccl|all_?reduce", "all_reduce", "communication"),
    (r"argmax|reduce_kernel|softmax|sort|topk|scan|cumsum|multinomial|isfinite|isnan", "sampling", "sampling"),
)
"""A kernel's name matches → part, kind; the first wins."""


class Observer(Protocol):
    """Watches the steps that run inside `watching`."""

    @abstractmethod
    def watching(self) -> Any: ...

    @abstractmethod
    def blamed(self, num_steps: int) -> list[Blamed]:
        """What was seen of so many steps, with each one's share of the wall time."""
        ...


def kernel_part(name: str) -> tuple[str, Kind]:
    """Part and kind of a kernel by its name."""
    for pattern, part, kind in KERNELS:
        if re.search(pattern, name, re.IGNORECASE):
            return part, kind
    return "copies and small kernels", "other on the device"


class GpuObserver:
    """Kernels and copies, as CUPTI timed them.

    Args:
        linears: names of a layer's weight products, in the order they run; given to the int4 kernels in turn where
            there is one for each.
    """

    def __init__(self, linears: Sequence[str], num_layers: int) -> None:
        self._linears, self._num_layers = list(linears), num_layers
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            yield
            torch.cuda.synchronize()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profiler.export_chrome_trace(file.name)
            self._events = json.loads(Path(file.name).read_text("utf-8"))["traceEvents"]

    def blamed(self, num_steps: int) -> list[Blamed]:
        return blame_queued(kernel_intervals(self._events, self._linears, num_steps * self._num_layers))


def kernel_intervals(events: Sequence[dict[str, Any]], linears: Sequence[str], num_layers: int) -> list[Interval]:
    """The device's work among a Chrome trace's events (times in µs).

    Args:
        num_layers: that ran, all steps together.
    """
    found = sorted(
        (event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")),
        key=lambda event: float(event["ts"]),
    )
    parts = [kernel_part(event["name"]) for event in found]
    quantized = [index for index, (part, _) in enumerate(parts) if part == "int4"]
    if len(quantized) == num_layers * len(linears):  # else a product takes several launches
        for turn, index in enumerate(quantized):
            parts[index] = (linears[turn % len(linears)], "weight GEMMs")
    intervals = []
    for event, (part, kind) in zip(found, parts, strict=True):
        begin = float(event["ts"]) * 1e-6
        intervals.append(Interval(begin, begin + float(event["dur"]) * 1e-6, part, kind))
    return intervals


class CpuObserver:
    """Calls of operations, of the model and of the runner, timed where they are made.

    Each layer holds the `launch` functions that were bound for it; while watching, timed ones stand in for them.
    """

    def __init__(self, model: CausalLM, runner: ModelRunner) -> None:
        self._model, self._runner = model, runner
        self._found: list[Interval] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._found = []
        restore = self._stand_in()
        try:
            yield
        finally:
            for owner, name, value in restore:
                if value is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)

    def blamed(self, num_steps: int) -> list[Blamed]:
        return blame_nested(self.intervals())

    def intervals(self) -> list[Interval]:
        """A step's time after its logits is the sampler's."""
        calls = sorted(self._found)
        logits = [call for call in calls if call.part == "logits"]
        sampling = []
        for step in (call for call in calls if call.part == "step"):
            ends = [call.end for call in logits if step.begin <= call.begin < step.end]
            if ends:
                sampling.append(Interval(max(ends), step.end, "sampling", "sampling"))
        return sorted(calls + sampling)

    def _stand_in(self) -> list[tuple[Any, str, Any]]:
        launches: dict[Any, str] = {impl.launch: op.name for op in OPS.values() for impl in op.all_impls}
        restore: list[tuple[Any, str, Any]] = []
        for path, module in _layers(self._model):
            for name, value in list(vars(module).items()):
                op = launches.get(value) if callable(value) and not isinstance(value, torch.nn.Module) else None
                if op is not None:
                    restore.append((module, name, value))
                    setattr(module, name, self._timed(value, _part_name(path, op), KIND_OF_OP[op]))
        for owner, name, part, kind in (
            (self._model, "forward", "embedding and Python", "other on the device"),
            (self._model, "logits", "logits", "other on the device"),
            (self._runner, "submit", "step", "host gaps"),
        ):
            restore.append((owner, name, None))
            setattr(owner, name, self._timed(getattr(owner, name), part, kind))  # type: ignore[arg-type]
        return restore

    def _timed(self, call: Callable[..., Any], part: str, kind: Kind) -> Callable[..., Any]:
        found = self._found

        @wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                found.append(Interval(begin, time.perf_counter(), part, kind))

        return timed


def _layers(model: CausalLM) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules with their paths, each once; those, too, that a layer keeps in a tuple, not being its own."""
    seen: set[torch.nn.Module] = set()
    for path, module in model.named_modules():
        kept = [item for value in vars(module).values() if isinstance(value, tuple) for item in value]
        for each in (module, *(item for item in kept if isinstance(item, torch.nn.Module))):
            if each not in seen:
                seen.add(each)
                yield path, each


def _part_name(path: str, op: str) -> str:
    """The layer's name for weight products, else the operation's."""
    if KIND_OF_OP[op] != "weight GEMMs":
        return op
    name = path.rpartition(".")[2].removesuffix("_proj")
    return "lm_head" if name == "embed_tokens" else name
