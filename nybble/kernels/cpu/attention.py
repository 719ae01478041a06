"""Attention on CPUs in C: keys and values are read once for all query heads that share them, and never copied."""

from __future__ import annotations

import ctypes
import functools

import torch

from nybble.kernels.cpu import compiler
from nybble.kernels.cpu.compiler import INTEGER, POINTER, TYPES
from nybble.kernels.op import Spec

DIM_STEP, MOST_DIM = 16, 256  # whole vectors on every machine; a constant of attention.c


class AttentionStruct(ctypes.Structure):
    """`struct attention` of attention.c."""

    _fields_ = (
        *((name, POINTER) for name in ("q", "keys", "values", "output", "tables", "lengths", "starts")),
        *((name, INTEGER) for name in ("sequences", "q_stride", "table_stride", "heads", "kv_heads", "head_dim")),
        *((name, INTEGER) for name in ("block_size", "window", "type", "most_queries", "most_keys")),
        ("scale", ctypes.c_double),
    )


@functools.cache
def function() -> ctypes._NamedFuncPointer:
    found = compiler.library().attention
    found.argtypes = [POINTER, POINTER, INTEGER]
    found.restype = None
    return found


def why_not(spec: Spec) -> str | None:
    if spec.device.type != "cpu":
        return "the C kernel runs on CPUs"
    if spec.dtype not in TYPES:
        return f"computes in fp16, bf16 or fp32, not {spec.dtype}"
    head_dim = spec.sizes["head_dim"]
    if head_dim % DIM_STEP or head_dim > MOST_DIM:
        return f"head_dim must be a multiple of {DIM_STEP} up to {MOST_DIM}, not {head_dim}"
    return compiler.why_not()


def launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    min_query_len: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    assert q.dtype == key_cache.dtype == value_cache.dtype, (q.dtype, key_cache.dtype)
    assert q.stride()[1:] == (head_dim, 1), q.stride()
    assert key_cache.is_contiguous(), key_cache.stride()
    assert value_cache.is_contiguous(), value_cache.stride()
    assert block_tables.stride(1) == 1, block_tables.stride()
    for lengths in (seq_lens, query_start):
        assert lengths.dtype == block_tables.dtype == torch.int32, (lengths.dtype, block_tables.dtype)
        assert lengths.is_contiguous(), lengths.stride()
    output = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    pointers = (q, key_cache, value_cache, output, block_tables, seq_lens, query_start)
    struct = AttentionStruct(
        *(tensor.data_ptr() for tensor in pointers),
        len(seq_lens),
        q.stride(0),
        block_tables.stride(0),
        heads,
        key_cache.shape[1],
        head_dim,
        key_cache.shape[2],
        sliding_window or 0,
        TYPES[q.dtype],
        max_query_len,
        max_seq_len,
        scale,
    )
    function()(ctypes.addressof(struct), compiler.thread_pool(), torch.get_num_threads())
    return output
