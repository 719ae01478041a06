"""Finds out what a device has and what a runner's worst step takes, by running that step.

The worst step goes through `ModelRunner.submit` like any other, so it allocates what serving will allocate, in the same
order. It needs no KV cache to speak of: block tables full of zeros make every sequence live in block 0.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
from msgspec.structs import replace

from nybble.core.batch import Batch, Row, SequenceStart
from nybble.core.config import ResolvedConfig
from nybble.core.errors import MemoryBudgetError
from nybble.core.sampling import MAX_LOGPROBS, SamplingParams
from nybble.runner.kv_cache import bytes_per_block
from nybble.runner.memory import MARGIN_BYTES, KVBudget, KVNeed, MemoryFacts, kv_budget
from nybble.runner.model_runner import Model, ModelRunner

_SAMPLE_GRAPHS = 4

_GREEDY = SamplingParams(temperature=0)
_EVERYTHING = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    allowed_token_ids=[0, 1, 2, 3],
    min_tokens=1,
    logprobs=MAX_LOGPROBS,
    prompt_logprobs=MAX_LOGPROBS,
)


def worst_batches(config: ResolvedConfig, vocab_size: int) -> list[Batch]:
    """Steps that take the most memory: all tokens and sequences with every sampling feature, as prefill, as decode and
    for prompt_logprobs. One sequence is as long as allowed; launches and workspaces are sized by the longest.
    """
    num_rows, longest = config.max_num_seqs, config.max_model_len
    num_tokens = min(config.max_num_batched_tokens, num_rows * longest)
    lengths = [num_tokens // num_rows + (row < num_tokens % num_rows) for row in range(num_rows)]
    starts = [longest - lengths[0]] + [0] * (num_rows - 1)
    prompt = [0] * min(config.max_num_batched_tokens, longest)

    def begin(slot: int, params: SamplingParams) -> SequenceStart:
        token_ids = [0] * (longest if slot == 0 else 1)
        words = [[1, 2, 3, 1]]
        return SequenceStart(
            slot=slot, params=params, prompt_token_ids=token_ids, end_token_ids=[1], bad_word_ids=words
        )

    def rows(starts: list[int], lengths: list[int]) -> list[Row]:
        return [
            Row(slot=slot, start=start, token_ids=[0] * length, sample=True)
            for slot, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]

    decode = rows([longest - 1] + [1] * (num_rows - 1), [1] * num_rows)
    masked = [replace(row, mask=b"\xff" * (-(-vocab_size // 32) * 4)) for row in decode]
    return [
        Batch(step_id=0, starts=[begin(s, _EVERYTHING) for s in range(num_rows)], rows=rows(starts, lengths)),
        Batch(step_id=1, rows=masked),
        Batch(step_id=2, rows=[Row(slot=0, start=0, token_ids=prompt, sample=True, prompt_logprobs=True)]),
        Batch(step_id=3, starts=[begin(s, _GREEDY) for s in range(num_rows)], rows=decode[:1]),
        Batch(step_id=4, rows=decode),
    ]


def run_worst(runner: ModelRunner, config: ResolvedConfig) -> None:
    for batch in worst_batches(config, runner.vocab_size):
        runner.submit(batch).result()


def common_batches(config: ResolvedConfig) -> list[Batch]:
    """Steps after which no request of an ordinary length waits for a kernel to be compiled.

    Prompts of 2, 4, 8, … tokens; then one of 2 tokens beside a sequence that gets its 1st, 2nd, 4th, … token.
    """
    start = SequenceStart(slot=0, params=_GREEDY, prompt_token_ids=[0], end_token_ids=[1])
    beside = Row(slot=1, start=0, token_ids=[0, 0], sample=True)
    prompts = [[Row(slot=0, start=0, token_ids=[0] * length, sample=True)] for length in (2**n for n in range(1, 11))]
    mixed = [
        [Row(slot=0, start=2**n - 1, token_ids=[0], sample=True), beside]
        for n in range(config.max_model_len.bit_length())
    ]
    batches = [
        Batch(step_id=step, starts=[replace(start, slot=row.slot) for row in rows], rows=rows)
        for step, rows in enumerate(prompts + mixed)
    ]
    longest = min(config.max_num_batched_tokens, config.max_model_len)
    return [b for b in batches if b.num_tokens <= longest and len(b.rows) <= config.max_num_seqs]


def plan_memory(model: Model, config: ResolvedConfig) -> tuple[MemoryFacts, KVBudget]:
    """Measure, then size the KV cache. Raises MemoryBudgetError where the setting does not work out."""
    need = KVNeed(
        bytes_per_block=bytes_per_block(model.kv_spec, config.block_size),
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_model_len_is_explicit=config.max_model_len_is_explicit,
    )
    facts = measure_gpu(model, config) if config.device == "cuda" else host_memory()
    return facts, kv_budget(config.memory, facts, need)


def warm_up(runner: ModelRunner, config: ResolvedConfig) -> None:
    """Run the worst and the common steps and capture the graphs, with the real KV cache in place.

    The allocator keeps what it reserved here, so serving finds its memory already taken. Nothing to do on a CPU.

    Raises:
        MemoryBudgetError: it did not fit after all, for instance because another process took memory meanwhile.
    """
    if runner.device.type != "cuda":
        return
    try:
        run_worst(runner, config)
        for batch in common_batches(config):  # before there are graphs, which would run in their place
            runner.submit(batch).result()
        runner.capture_graphs()
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"{config.memory}: the KV cache fits, but a step at its worst does not beside it ({_first_line(error)}); "
            f"another process may have taken memory since it was measured: lower {config.memory.name}"
        ) from error


def measure_gpu(model: Model, config: ResolvedConfig) -> MemoryFacts:
    """What the device holds now, and the workspace of a runner (made for this, and gone afterwards)."""
    release_gpu()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    runner = None
    try:
        runner = ModelRunner(model, config, num_blocks=1)
        run_worst(runner, config)
        peak = torch.cuda.max_memory_reserved() - reserved
        # Compiled kernels and library handles take memory that the allocator knows nothing of.
        outside = (free - torch.cuda.mem_get_info()[0]) - (torch.cuda.memory_reserved() - reserved)
        graphs = _graph_bytes(runner)
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"of {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free after the weights: too little for one step of "
            f"max_num_batched_tokens = {config.max_num_batched_tokens} with max_num_seqs = {config.max_num_seqs}, "
            f"even without a KV cache ({_first_line(error)}); lower both"
        ) from error
    finally:
        if runner is not None:
            runner.close()
        del runner
        release_gpu()
    return MemoryFacts(
        total_bytes=total,
        used_bytes=total - free,
        workspace_bytes=peak + max(outside, 0) + graphs,
        margin_bytes=MARGIN_BYTES,
    )


def _graph_bytes(runner: ModelRunner) -> int:
    """Device memory of all graphs, extrapolated from a few: the largest makes the pool they share."""
    sizes = sorted(runner.graph_sizes, reverse=True)
    if not sizes:
        return 0
    free = [torch.cuda.mem_get_info()[0]]
    rest = sizes[1:]
    sample = rest[:: max(1, len(rest) // _SAMPLE_GRAPHS)]  # of all kinds: larger steps launch more
    for sizes_now in (sizes[:1], sample):
        if sizes_now:
            runner.capture_graphs(sizes_now)
        free.append(torch.cuda.mem_get_info()[0])
    first, more = free[0] - free[1], free[1] - free[2]
    return max(first, 0) + max(more, 0) * len(rest) // max(len(sample), 1)


def release_gpu() -> None:
    """Give back what the allocator holds without need."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def host_memory() -> MemoryFacts:
    """The machine's memory; what other programs use counts as used.

    A step at its worst would take minutes to run on a CPU, so it is not measured: a tenth of the memory is kept for it.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    available = total
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    return MemoryFacts(total_bytes=total, used_bytes=total - available, margin_bytes=total // 10)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
