"""CUDA graphs of the pure-decode step, one for each of a few batch sizes.

Owns: the captured graphs and their shared memory pool. Does not know: what the step computes.

A graph replays the same kernels on the same addresses, so the step it captures must read its inputs from, and leave its
results in, memory that someone else owns. Nothing that is allocated during a capture may be used after the replay: the
next graph lives in the same pool.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: finest where one more row costs most. Larger batches run without a graph."""
    sizes = [*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 129, 8), *range(144, 257, 16)]
    largest = min(max_num_seqs, sizes[-1])
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """Graphs of `step(num_rows)` for the sizes given.

    Args:
        prepare: puts valid inputs of so many rows in place; not captured.
        step: what is captured. Runs twice a size, so it must have no effect that a repetition would spoil.
    """

    def __init__(
        self,
        prepare: Callable[[int], None],
        step: Callable[[int], None],
        sizes: list[int],
        stream: torch.cuda.Stream,
    ) -> None:
        self.sizes = sizes
        self._prepare = prepare
        self._step = step
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, sizes: list[int] | None = None) -> None:
        """Capture the largest first: the smaller ones then fit into the pool that it made."""
        gc.collect()
        gc.disable()  # a collection could free CUDA memory in the middle of a capture, which breaks it
        try:
            for size in sorted(sizes or self.sizes, reverse=True):
                self._graphs[size] = self._capture_one(size)
        finally:
            gc.enable()

    def _capture_one(self, size: int) -> torch.cuda.CUDAGraph:
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

    def size_for(self, num_rows: int) -> int | None:
        """The smallest captured size that holds so many rows."""
        return next((size for size in self.sizes if size >= num_rows and size in self._graphs), None)

    def replay(self, size: int) -> None:
        self._graphs[size].replay()
