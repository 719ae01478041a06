"""The two ways to a profile: measured on this machine, or from the roofline of one that is not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nybble.bench.offline import opened_model
from nybble.core import machine as host
from nybble.core.errors import ConfigError
from nybble.llm import LLM
from nybble.perf.ceilings import Ceilings, measure_ceilings
from nybble.perf.decoding import KVMemoryError
from nybble.perf.intervals import Interval, write_trace
from nybble.perf.located import located
from nybble.perf.machines import Machine, check_link, in_table
from nybble.perf.memory_model import plan_memory
from nybble.perf.model_shape import ModelShape, read_checkpoint
from nybble.perf.profile_document import Capacity, make_document, step_name, step_row
from nybble.perf.profile_engine import PREFILL_TOKENS, measurable, profile_engine
from nybble.perf.roofline import Roofline
from nybble.perf.step_cost import Work
from nybble.perf.step_profile import StepProfiler, StepTimes, prompt_len_for, steps_needed
from nybble.progress import Progress

PLANNED_UTILIZATION = 0.9
PLANNED_STEP_TOKENS = 8192


def dry_profile(
    shape: ModelShape,
    machine: Machine,
    num_devices: int,
    batches: Sequence[int],
    context_lens: Sequence[int],
    prefill_len: int | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The roofline of each step, at each context each batch, from config.json and the machine's table entry.

    Args:
        prefill_len: 0: no prefill step; None: 2048 tokens, or as many as the model has positions.

    Raises:
        ConfigError: the model cannot be split so, or has fewer positions; or nothing is known of the machines' link.
    """
    check_link(machine, num_devices)
    positions = shape.config.max_position_embeddings
    prefill_len = min(PREFILL_TOKENS["cuda"], positions) if prefill_len is None else prefill_len
    longest = max(*context_lens, prefill_len)
    if longest > positions:
        raise ConfigError(
            f"{longest} tokens (--context-len, --prefill-len) are more than the model's {positions} positions"
        )
    machine = machine.sustained()
    dtype = torch.float16
    whole = Roofline(shape, machine, dtype)
    roofline = Roofline(shape.split_by(num_devices), machine, dtype)
    cases = [(batch, context_len) for context_len in context_lens for batch in batches]
    rows = [step_row("decode", Work.decode(*case), case[1], roofline, None) for case in cases]
    if prefill_len:
        rows.append(step_row("prefill", Work.prefill(prefill_len), prefill_len, roofline, None))
    plan = plan_memory(
        roofline.shape,
        machine,
        dtype.itemsize,
        max_num_seqs=max(batches),
        max_num_batched_tokens=PLANNED_STEP_TOKENS,
    )
    capacity = Capacity(
        kv_tokens=plan.kv_tokens(PLANNED_UTILIZATION),
        source=f"estimated, at gpu_memory_utilization {PLANNED_UTILIZATION}",
    )
    warnings = [
        f"batch {batch} at {context_len:,} tokens: {batch * context_len:,} tokens of KV are more than there is room "
        f"for, {capacity.kv_tokens:,} ({capacity.source}); its row is what the roofline alone allows"
        for batch, context_len in cases
        if batch * context_len > capacity.kv_tokens
    ]
    return make_document(
        settings=settings,
        whole=whole,
        roofline=roofline,
        rows=rows,
        capacity=capacity,
        warnings=warnings,
        facts={"mode": "dry run"},
    )


def measured_profile(
    model: str | None,
    synthetic: str | None,
    engine: Mapping[str, Any],
    batches: Sequence[int],
    context_lens: Sequence[int],
    prefill_len: int | None,
    *,
    num_steps: int,
    repeats: int,
    settings: Mapping[str, Any],
    trace: Path | None,
    show_bar: bool,
) -> dict[str, Any]:
    """Steps of an engine that is made for it; the ceilings are measured first, on a device that is still free.

    Args:
        prefill_len: as for `profile_engine`.

    Raises:
        ConfigError: as `profile_engine`, before anything is measured; or none of the batches fits in the KV cache.
    """
    _, resolved = located(model, synthetic, engine)
    total_steps = steps_needed(num_steps, repeats)
    batches, warnings = measurable(engine, batches)
    options, prefill_len = profile_engine(engine, resolved, batches, context_lens, prefill_len, total_steps)
    warnings += [
        f"--context-len {asked}: measured at {met}, as half of the {total_steps} steps come before it; lower --steps "
        "or --repeats"
        for asked in context_lens
        if (met := prompt_len_for(asked, total_steps) + total_steps // 2) != asked
    ]
    dtype = getattr(torch, resolved.dtype)
    machine = this_machine(resolved.device, dtype, measured=True)
    with opened_model(model, synthetic, options) as llm:
        roofline = Roofline(read_checkpoint(llm.checkpoint), machine, dtype)
        measured, left_out = _measure(llm, batches, context_lens, prefill_len, num_steps, repeats, show_bar)
        rows = [step_row(times.name, times.work, times.context_len, roofline, times) for times in measured]
        capacity = Capacity(kv_tokens=llm.report.num_kv_tokens, source=f"as this engine has it, {llm.config.memory}")
        facts = {
            "mode": "measured",
            "engine": dict(llm.config.table()),
            "startup": vars(llm.report),
        }
    if trace is not None:
        write_trace(
            trace, {step_name(row): _from_zero(times.intervals) for row, times in zip(rows, measured, strict=True)}
        )
    return make_document(
        settings=settings,
        whole=roofline,
        roofline=roofline,
        rows=rows,
        capacity=capacity,
        warnings=warnings + left_out,
        facts=facts,
    )


def _measure(
    llm: LLM,
    batches: Sequence[int],
    context_lens: Sequence[int],
    prefill_len: int,
    num_steps: int,
    repeats: int,
    show_bar: bool,
) -> tuple[list[StepTimes], list[str]]:
    """What was measured, and a warning of each batch that was not, as it does not fit in the KV cache.

    Raises:
        KVMemoryError: none does.
    """
    profiler = StepProfiler(llm, num_steps=num_steps, repeats=repeats)
    measured: list[StepTimes] = []
    left_out: list[KVMemoryError] = []
    cases = [(batch, context_len) for context_len in context_lens for batch in batches]
    with Progress(len(cases) + bool(prefill_len), show_bar) as bar:
        for batch, context_len in cases:
            try:
                measured.append(profiler.decode(batch, context_len))
            except KVMemoryError as error:
                left_out.append(error)
            bar.advance(batch * num_steps * repeats, 1, f"decode {batch} at {context_len:,}")
        if not measured:
            raise left_out[0]
        if prefill_len:
            measured.append(profiler.prefill(prefill_len))
            bar.advance(prefill_len * repeats, 1, f"prefill {prefill_len}")
    return measured, [f"not measured: {error}" for error in left_out]


def device_here(device: str) -> str:
    """What `auto`, `cpu` or `cuda` comes to on this machine: cpu or cuda.

    Raises:
        ConfigError: cuda, and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda, but torch finds no CUDA device; see `nybble doctor`")
    return "cuda" if has_cuda and device != "cpu" else "cpu"


def this_machine(device: str, dtype: torch.dtype, *, measured: bool = False) -> Machine:
    """The machine that this runs on: rates as in the table where it has the GPU, else measured.

    Args:
        device: cpu or cuda, as `device_here` says.
        dtype: that an engine computes in.
        measured: measure its rates in any case.
    """
    if device == "cpu":
        found = measure_ceilings(torch.device("cpu"), dtype)
        return _measured(host.cpu_name(), float(host.memory_bytes() or 0), found, None)
    name = torch.cuda.get_device_name()
    known = in_table(name)
    if known is not None and not measured:
        return known
    found = measure_ceilings(torch.device("cuda"), dtype)
    return _measured(name, float(torch.cuda.get_device_properties(0).total_memory), found, known)


def _measured(name: str, memory_bytes: float, found: Ceilings, known: Machine | None) -> Machine:
    """What was found, and the table's figures of what was not measured."""
    known = None if known is None else known.sustained()
    return Machine(
        name=name,
        memory_bytes=memory_bytes,
        read_bytes_per_second=found.read_bytes_per_second,
        flops_per_second=found.flops_per_second,
        integer_ops_per_second=known.integer_ops_per_second if known else None,
        link_bytes_per_second=known.link_bytes_per_second if known else None,
        link_seconds=known.link_seconds if known else 0.0,
        is_measured=True,
        how=found.how,
        int4_flops_per_second=found.int4_flops_per_second,
    )


def _from_zero(intervals: Sequence[Interval]) -> list[Interval]:
    """Each step's intervals from zero on, so that tracks lie below each other."""
    first = min((interval.begin for interval in intervals), default=0.0)
    return [replace(interval, begin=interval.begin - first, end=interval.end - first) for interval in intervals]
