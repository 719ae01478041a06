"""Keys and values into the paged cache in Triton, both in one launch. Meaning: `nybble.kernels.kv_write`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton import overlap


@triton.jit
def kv_write_kernel(
    k_ptr,
    v_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    overlap.begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        inside = (head < HEADS) & (d < D)
        k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + d, mask=inside)
        v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + d, mask=inside)
        block = slot // BLOCK_SIZE
        target = ((block * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D + d
        tl.store(key_cache_ptr + target, k.to(key_cache_ptr.dtype.element_ty), mask=inside)
        tl.store(value_cache_ptr + target, v.to(value_cache_ptr.dtype.element_ty), mask=inside)


def launch(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    assert k.stride(2) == v.stride(2) == 1, (k.stride(), v.stride())
    assert key_cache.is_contiguous(), key_cache.stride()
    assert value_cache.is_contiguous(), value_cache.stride()
    tokens, heads, head_dim = k.shape
    kv_write_kernel[(tokens,)](
        k,
        v,
        key_cache,
        value_cache,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEADS=heads,
        D=head_dim,
        BLOCK_SIZE=key_cache.shape[2],
        BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(head_dim),
        **overlap.options(k.device),
    )
