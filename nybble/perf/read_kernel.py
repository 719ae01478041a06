"""A Triton kernel that only reads: what the memory of a GPU gives when nothing has to be written.

All programs together sweep the buffer from its beginning to its end in blocks of 16 KB, so that at any moment they read
one moving window of it; each adds up what it sees, or the compiler would leave the loads out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # int32 elements: 16 KB, four 16-byte loads for each of 256 threads


@triton.jit
def read_kernel(source_ptr, sums_ptr, num_blocks, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        # In 64 bits: a buffer of over 2³¹ elements would otherwise wrap around.
        total += tl.load(source_ptr + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


def read(source: torch.Tensor, sums: torch.Tensor) -> None:
    """Read int32 `source`, a whole number of blocks, by len(sums) programs; their sums go to `sums`, int32."""
    num_blocks, rest = divmod(source.numel(), BLOCK)
    assert rest == 0, source.shape
    read_kernel[(len(sums),)](source, sums, num_blocks, BLOCK=BLOCK, num_warps=8)
