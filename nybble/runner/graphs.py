"""CUDA graphs of the steps whose launches would cost the host more than their work costs the device.

That is decode, for a few batch sizes, and steps of a few hundred tokens, prompts among them. (A prompt of 250
tokens takes an H200 34 ms through a 32B model; to launch its kernels one by one takes the host 85.)

Owns: the captured graphs and their shared memory pool. Does not know: what the step computes.

A graph replays the same kernels on the same addresses, so the step it captures must read its inputs from, and leave its
results in, memory that someone else owns. Nothing that is allocated during a capture may be used after the replay: the
next graph lives in the same pool.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nybble.kernels.cuda import w4a16, w4a16_wgmma

PROMPT_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
LONGEST, LONGEST_BEFORE_HOPPER = w4a16_wgmma.SLICED_TOKENS, w4a16.SLICED_TOKENS
"""Tokens. Larger steps make a 16-bit copy of a weight to multiply; graphs would keep memory of their own for it."""


@dataclass(frozen=True, order=True)
class StepSize:
    """Tokens and rows of a step; in a decode step each row brings one token and samples."""

    num_tokens: int
    num_rows: int
    is_decode: bool = False


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: finest where one more row costs most. Larger batches run without a graph."""
    sizes = [*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 129, 8), *range(144, 257, 16)]
    largest = min(max_num_seqs, sizes[-1])
    return [size for size in sizes if size < largest] + [largest]


def step_sizes(max_num_seqs: int, max_num_batched_tokens: int, longest: int = LONGEST) -> list[StepSize]:
    """All sizes to capture, ascending. A row costs little more than its logits, so few numbers of rows do.

    Args:
        longest: step with prompts, in tokens.
    """
    sizes = {StepSize(size, size, is_decode=True) for size in decode_sizes(max_num_seqs)}
    for num_tokens in PROMPT_TOKENS:
        if num_tokens <= min(longest, max_num_batched_tokens):
            sizes |= {StepSize(num_tokens, min(num_rows, num_tokens, max_num_seqs)) for num_rows in (8, 64, 256)}
    return sorted(sizes)


class StepGraphs:
    """Graphs of `step(size)` for the sizes given.

    Args:
        prepare: puts valid inputs of such a step in place; not captured.
        step: what is captured. Runs twice a size, so it must have no effect that a repetition would spoil.
    """

    def __init__(
        self,
        prepare: Callable[[StepSize], None],
        step: Callable[[StepSize], None],
        sizes: list[StepSize],
        stream: torch.cuda.Stream,
    ) -> None:
        self.sizes = sizes
        self._prepare = prepare
        self._step = step
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepSize, torch.cuda.CUDAGraph] = {}

    def capture(self, sizes: list[StepSize] | None = None) -> None:
        """Capture the largest first: the smaller ones then fit into the pool that it made."""
        gc.collect()
        gc.disable()  # a collection could free CUDA memory in the middle of a capture, which breaks it
        try:
            for size in sorted(sizes or self.sizes, reverse=True):
                self._graphs[size] = self._capture_one(size)
        finally:
            gc.enable()

    def _capture_one(self, size: StepSize) -> torch.cuda.CUDAGraph:
        self._prepare(size)
        self._step(size)  # compiles kernels and sets up libraries, neither of which a capture allows
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._step(size)
        finally:
            graph.capture_end()
        return graph

    def size_for(self, wanted: StepSize) -> StepSize | None:
        """The smallest captured size that holds such a step."""
        return next(
            (
                size
                for size in self.sizes
                if size.is_decode == wanted.is_decode
                and size.num_tokens >= wanted.num_tokens
                and size.num_rows >= wanted.num_rows
                and size in self._graphs
            ),
            None,
        )

    def replay(self, size: StepSize) -> None:
        self._graphs[size].replay()
