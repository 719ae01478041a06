"""`ModelRunner`: executes batches. Implements `core.batch.Runner`.

Owns: the model, the KV cache, the slots' state on the device, the CUDA stream and graphs. Does not know: queues, users,
text, stop conditions.

On CUDA a step is enqueued and `submit` returns; sampled ids stay on the device, where the next step takes them from. On
a CPU the same code has done its work when `submit` returns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from nybble.core.batch import Batch
from nybble.core.config import ResolvedConfig
from nybble.layers.context import ForwardContext, KVSpec
from nybble.runner import sampler
from nybble.runner.graphs import LONGEST, LONGEST_BEFORE_HOPPER, StepGraphs, StepSize, step_sizes
from nybble.runner.inputs import BlockTables, HostStep, StagingBuffer, gather, idle_step, staging_bytes, step_arrays
from nybble.runner.kv_cache import KVCache
from nybble.runner.logprobs import concatenate, gather_logprobs
from nybble.runner.results import SubmittedStep, logprobs_to_host, to_host
from nybble.runner.sampling_state import NO_LOGPROBS, SamplingPlan, SamplingState


class Model(Protocol):
    """What the runner needs of a model."""

    config: Any  # has vocab_size
    kv_spec: KVSpec

    def __call__(self, token_ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class ModelRunner:
    """Runs one model on one device.

    Args:
        num_blocks: KV blocks to allocate.
        is_async: whether the engine may submit a step before it has the last one's result; default: on CUDA. A CPU can
            run that way too, which gains nothing and lets tests follow the path that a GPU takes.
    """

    def __init__(self, model: Model, config: ResolvedConfig, *, num_blocks: int, is_async: bool | None = None) -> None:
        self.device = torch.device(config.device)
        self.num_blocks = num_blocks
        self.block_size = config.block_size
        self.is_async = self.device.type == "cuda" if is_async is None else is_async
        self.model = model
        self._config = config
        self._idle_slot = config.max_num_seqs
        self.vocab_size = int(model.config.vocab_size)
        self._cuda_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._cuda_stream is not None:
            # The weights may still be on their way.
            self._cuda_stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._stream():
            self.kv_cache = KVCache(
                model.kv_spec, num_blocks=num_blocks, block_size=config.block_size, device=self.device
            )
            self._tables = BlockTables(config, self.device)
            self._staging = StagingBuffer(staging_bytes(config), self.device)
            self._sampling = SamplingState(config, self.vocab_size, self.device)
            self._last_ids = torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=self.device)
            self._prompts: dict[int, tuple[np.ndarray, int]] = {}  # of slots that want prompt_logprobs
            self._graphs = self._make_graphs()

    def _make_graphs(self) -> StepGraphs | None:
        if self._cuda_stream is None or self._config.enforce_eager:
            return None
        is_hopper = torch.cuda.get_device_capability(self.device)[0] == 9
        longest = LONGEST if is_hopper else LONGEST_BEFORE_HOPPER
        sizes = step_sizes(self._config.max_num_seqs, self._config.max_num_batched_tokens, longest)
        self._make_graph_results(sizes)
        return StepGraphs(self._upload_idle_step, self._staged_step, sizes, self._cuda_stream)

    def _make_graph_results(self, sizes: list[StepSize]) -> None:
        num_rows = max(size.num_rows for size in sizes)
        self._graph_logits = torch.zeros(num_rows, self.vocab_size, device=self.device)
        self._graph_ids = torch.zeros(num_rows, dtype=torch.int64, device=self.device)

    def capture_graphs(self, sizes: list[StepSize] | None = None) -> None:
        """Capture the graphs, all of them or some sizes. Does nothing where there are none."""
        if self._graphs is not None:
            with self._stream(), torch.inference_mode():
                self._graphs.capture(sizes)

    @property
    def graph_sizes(self) -> list[StepSize]:
        return [] if self._graphs is None else list(self._graphs.sizes)

    def submit(self, batch: Batch) -> SubmittedStep:
        with self._stream(), torch.inference_mode():
            for start in batch.starts:
                self._tables.reset(start.slot)
                self._sampling.start(start)
                if start.params.prompt_logprobs is not None:
                    prompt = np.array(start.prompt_token_ids, dtype=np.int64)
                    self._prompts[start.slot] = (prompt, start.params.prompt_logprobs)
            host = gather(batch, self._tables)
            plans = self._plan(host, [batch.rows[row].mask for row in host.sample_rows.tolist()])
            wants_prompt = any(row.prompt_logprobs for row in batch.rows)
            size = None if self._graphs is None or wants_prompt else self._graphs.size_for(host.size)
            step = SubmittedStep(num_rows=len(batch.rows), sample_rows=host.sample_rows.tolist())
            if size is None:
                self._run_eager(batch, host, plans, step)
            else:
                self._run_graph(size, host, plans, step)
            if self._cuda_stream is not None:
                step.done = torch.cuda.Event()
                step.done.record(self._cuda_stream)
            return step

    def close(self) -> None:
        """Wait for the device and let go of everything but the model."""
        if self._cuda_stream is not None:
            self._cuda_stream.synchronize()
        for name in (
            "kv_cache",
            "_tables",
            "_staging",
            "_sampling",
            "_last_ids",
            "_graphs",
            "_graph_logits",
            "_graph_ids",
        ):
            self.__dict__.pop(name, None)

    def _stream(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._cuda_stream is None else torch.cuda.stream(self._cuda_stream)

    def _plan(self, host: HostStep, masks: list[bytes | None]) -> list[tuple[slice, SamplingPlan]]:
        slots = host.slots[host.sample_rows]
        slices = sampler.slice_rows(len(slots), self.vocab_size)
        return [(part, self._sampling.plan(slots[part], host.num_output_tokens[part], masks[part])) for part in slices]

    def _upload(self, host: HostStep, plans: list[tuple[slice, SamplingPlan]]) -> dict[str, torch.Tensor]:
        """Bring a step's arrays to the device and the block tables up to date."""
        arrays = step_arrays(host)
        if len(host.table_positions):
            arrays |= {"table_positions": host.table_positions, "table_block_ids": host.table_block_ids}
        arrays["sample_rows"] = host.sample_rows
        arrays["sample_slots"] = host.slots[host.sample_rows]
        arrays["sample_tokens"] = host.query_start[1:][host.sample_rows].astype(np.int64) - 1
        for index, (_, plan) in enumerate(plans):
            if not plan.is_argmax:
                arrays |= {f"{name}/{index}": array for name, array in sampler.plan_arrays(plan).items()}
        device = self._staging.upload(arrays)
        if len(host.table_positions):
            self._tables.device.view(-1).scatter_(0, device["table_positions"], device["table_block_ids"])
        return device

    def _run_eager(
        self, batch: Batch, host: HostStep, plans: list[tuple[slice, SamplingPlan]], step: SubmittedStep
    ) -> None:
        device = self._upload(host, plans)
        token_ids = device["token_ids"]
        if (host.token_ids < 0).any():
            self._fill_in(token_ids, device["query_start"][1:].long() - 1, device["slots"])
        query_lens = np.diff(host.query_start)
        # Attention of rows with more tokens then comes first, after all keys are written: see HostStep.size.
        longest = max(int(query_lens.max()), 2 if host.starts else 1)
        bounds = int(query_lens.min()), longest
        # Triton divides a decode step's keys, and so rounds, by the longest there may be: here as in a graph.
        is_like_a_graph = host.size.is_decode and self._cuda_stream is not None
        max_seq_len = self._config.max_model_len if is_like_a_graph else int(host.seq_lens.max())
        hidden = self.model(token_ids, self._context(device, bounds, max_seq_len))
        self._gather_prompt_logprobs(batch, host, hidden, step)
        if plans:
            logits = self.model.logits(hidden[device["sample_tokens"]])
            self._sample(logits, None, plans, device, step)

    def _run_graph(
        self, size: StepSize, host: HostStep, plans: list[tuple[slice, SamplingPlan]], step: SubmittedStep
    ) -> None:
        device = self._upload(host.padded(size, self._idle_slot), plans)
        assert self._graphs is not None
        self._graphs.replay(size)
        num_rows = len(host.slots)
        if size.is_decode:
            self._sample(self._graph_logits[:num_rows], self._graph_ids[:num_rows], plans, device, step)
        elif plans:
            self._sample(self._graph_logits[device["sample_rows"]], None, plans, device, step)

    def _upload_idle_step(self, size: StepSize) -> None:
        self._upload(idle_step(size, self._idle_slot), [])

    def _staged_step(self, size: StepSize) -> None:
        """What a graph holds: a step of fixed size, from staged inputs to results in memory that stays."""
        if size.is_decode:
            slots, logits, ids = self._decode_staged(size.num_rows)
            self._graph_ids[: size.num_rows].copy_(ids)
            self._last_ids.index_copy_(0, slots, ids.clamp(min=0))
        else:
            logits = self._mixed_staged(size)
        self._graph_logits[: size.num_rows].copy_(logits)

    def _decode_staged(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots, logits and greedy ids of the decode step of so many rows whose inputs are staged."""
        size = StepSize(num_rows, num_rows, is_decode=True)
        device = self._staging.views(step_arrays(idle_step(size, self._idle_slot)))
        slots = device["slots"]
        token_ids = torch.where(device["token_ids"] < 0, self._last_ids[slots], device["token_ids"])
        hidden = self.model(token_ids, self._context(device, (1, 1), self._config.max_model_len))
        logits = self.model.logits(hidden)
        return slots, logits, sampler.sample_greedy(logits)

    def _mixed_staged(self, size: StepSize) -> torch.Tensor:
        """Logits of each row's last token, of the step whose inputs are staged."""
        device = self._staging.views(step_arrays(idle_step(size, self._idle_slot)))
        # Rows that fill up the step have no token: theirs is one behind all others.
        last = torch.where(device["seq_lens"] > 0, device["query_start"][1:].long() - 1, size.num_tokens)
        token_ids = torch.nn.functional.pad(device["token_ids"], (0, 1))
        self._fill_in(token_ids, last, device["slots"])
        ctx = self._context(device, (1, size.num_tokens), self._config.max_model_len)
        hidden = self.model(token_ids[:-1], ctx)
        return self.model.logits(hidden[last.clamp(max=size.num_tokens - 1)])

    def _fill_in(self, token_ids: torch.Tensor, last: torch.Tensor, slots: torch.Tensor) -> None:
        """Where a row's last token is one that its slot sampled and the host does not know yet, put it in."""
        own = token_ids[last]
        token_ids.index_copy_(0, last, torch.where(own < 0, self._last_ids[slots], own))

    def time_decode_step(self, num_rows: int, repeats: int) -> list[float]:
        """Seconds that the device takes for the decode step submitted last, each of so many times.

        For measuring. It must have been of `num_rows` rows, and what these sequences generate afterwards is no longer
        theirs: the step runs again from their last inputs and writes to the same places of the cache. On a GPU it is
        the graph's replay between events, elsewhere the model and the greedy choice by the clock.
        """
        size = None if self._graphs is None else self._graphs.size_for(StepSize(num_rows, num_rows, is_decode=True))
        with self._stream(), torch.inference_mode():
            if self._cuda_stream is None:
                return [_seconds_of(lambda: self._decode_staged(num_rows)) for _ in range(repeats)]
            graphs = self._graphs
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
            for mark in marks:
                # The first one warms up; the stream never runs empty between two of them.
                if size is None or graphs is None:
                    self._decode_staged(num_rows)
                else:
                    graphs.replay(size)
                mark.record()
            self._cuda_stream.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks[1:])]

    def _context(
        self,
        device: dict[str, torch.Tensor],
        query_lens: tuple[int, int],
        max_seq_len: int,
    ) -> ForwardContext:
        """query_lens: the fewest and the most new tokens of a sequence."""
        num_blocks = -(-max_seq_len // self.block_size)
        return ForwardContext(
            positions=device["positions"],
            slot_mapping=device["slot_mapping"],
            block_tables=self._tables.device[:, :num_blocks].index_select(0, device["slots"]),
            seq_lens=device["seq_lens"],
            query_start=device["query_start"],
            min_query_len=query_lens[0],
            max_query_len=query_lens[1],
            max_seq_len=max_seq_len,
            kv_caches=self.kv_cache.layers,
        )

    def _sample(
        self,
        logits: torch.Tensor,
        greedy_ids: torch.Tensor | None,
        plans: list[tuple[slice, SamplingPlan]],
        device: dict[str, torch.Tensor],
        step: SubmittedStep,
    ) -> None:
        """Sample every slice, remember the ids on the device, start them on their way to the host.

        greedy_ids: where they are known already; random rows then replace what the graph put into `_last_ids`.
        """
        parts = []
        for index, (part, plan) in enumerate(plans):
            if plan.is_argmax and greedy_ids is not None:
                parts.append(greedy_ids[part])
            else:
                inputs = {name: device.get(f"{name}/{index}") for name in sampler.PLAN_ARRAYS}
                parts.append(sampler.sample(logits[part], plan, inputs, self._sampling))
                if plan.needs_history:
                    self._sampling.append(inputs["slots"], inputs["history_lengths"], parts[-1])
            if (plan.num_logprobs > NO_LOGPROBS).any():
                rows, tensors = sampler.sampled_logprobs(logits[part], parts[-1], plan)
                wanted = [step.sample_rows[part][row] for row in rows.tolist()]
                step.logprobs.append((wanted, plan.num_logprobs[rows].tolist(), logprobs_to_host(tensors)))
        ids = parts[0] if len(parts) == 1 else torch.cat(parts)
        if greedy_ids is None or not all(plan.is_argmax for _, plan in plans):
            self._last_ids.index_copy_(0, device["sample_slots"], ids.clamp(min=0))
        step.token_ids = to_host(ids)

    def _gather_prompt_logprobs(self, batch: Batch, host: HostStep, hidden: torch.Tensor, step: SubmittedStep) -> None:
        """For the rows that ask; in slices of tokens, as [tokens, vocabulary] would be huge."""
        for index, row in enumerate(batch.rows):
            if not row.prompt_logprobs:
                continue
            prompt, count = self._prompts[row.slot]
            targets = torch.from_numpy(prompt[row.start + 1 : row.start + len(row.token_ids) + 1])
            targets = targets.to(self.device, non_blocking=True)
            begin = int(host.query_start[index])
            parts = []
            for part in sampler.slice_rows(len(targets), self.vocab_size):
                logits = self.model.logits(hidden[begin + part.start : begin + part.stop])
                parts.append(gather_logprobs(logits, targets[part], count))
            if parts:
                step.prompt_logprobs.append((index, count, logprobs_to_host(concatenate(parts))))


def _seconds_of(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
