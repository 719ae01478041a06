"""A Triton kernel that only reads: what the memory of a GPU gives when nothing has to be written.

All programs together sweep the buffer from its beginning to its end in blocks of 16 KB, so that at any moment they read
one moving window of it; each adds up what it sees, or the compiler would leave the loads out. The four quarters of a
block share their sums: with a sum for each element there would be no registers for eight programs on a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # int32 elements: 16 KB, four 16-byte loads for each of 256 threads


@triton.jit
def read_kernel(source_ptr, sums_ptr, num_blocks, BLOCK: tl.constexpr):
    QUARTER: tl.constexpr = BLOCK // 4
    # Offsets in 64 bits: a buffer of over 2³¹ elements would otherwise wrap around.
    block_ptr = source_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, QUARTER)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    total = tl.zeros((QUARTER,), tl.int32)
    for _ in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        first, second = tl.load(block_ptr), tl.load(block_ptr + QUARTER)
        third, fourth = tl.load(block_ptr + 2 * QUARTER), tl.load(block_ptr + 3 * QUARTER)
        total += first + second + third + fourth
        block_ptr += stride
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


def read(source: torch.Tensor, sums: torch.Tensor) -> None:
    """Read int32 `source`, a whole number of blocks, by len(sums) programs; their sums go to `sums`, int32."""
    num_blocks, rest = divmod(source.numel(), BLOCK)
    assert rest == 0, source.shape
    read_kernel[(len(sums),)](source, sums, num_blocks, BLOCK=BLOCK, num_warps=8)
