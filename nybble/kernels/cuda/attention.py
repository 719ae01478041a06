"""attention on Ampere and newer: `attention_decode.cu` for sequences of one new token, Triton for those of more."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.kernels import triton
from nybble.kernels.cuda import nvrtc
from nybble.kernels.op import Spec

prefill = triton.deferred("attention", "prefill")
by_triton = triton.deferred("attention")

SOURCE = Path(__file__).parent / "attention_decode.cu"
LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256
HEADS = 8  # query heads of a KV head, at most
WARP_KEYS = 16
MAX_BLOCKS = 2  # of a multiprocessor
MANY_ROWS = 48  # decoding: with more, pairs of a row and a head are enough to go round, and Triton's kernel is faster
RING_BYTES = 96 * 1024  # sm_86 has 99 KB; and a block of the product before or after fits beside it on Hopper


def supports(spec: Spec) -> str | None:
    """None where the kernel runs, else why not."""
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in fp16 or bf16, not {spec.dtype}"
    head_dim, group = spec.sizes["head_dim"], spec.sizes["query_heads"] // spec.sizes["kv_heads"]
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"heads must be a multiple of 16 up to {MAX_HEAD_DIM}, not {head_dim}"
    if group > HEADS:
        return f"at most {HEADS} query heads may share a KV head, not {group}"
    return triton.why_not(spec) or nvrtc.why_not()


@dataclass(frozen=True)
class Tuning:
    """Compile-time choices of the kernel, and how many blocks a multiprocessor gets."""

    warps: int
    stages: int
    blocks: int


def tuning_for(head_dim: int, rows: int) -> Tuning:
    """Four warps, or two where a stage is large; as many stages as RING_BYTES hold.

    Few sequences get one block a multiprocessor, which leaves room for a block of the product that comes next, and that
    brings its weights meanwhile. More sequences need more keys on their way (docs/log.md, 2026-11-27).
    """
    warps = 4 if head_dim <= 128 else 2
    return Tuning(warps, RING_BYTES // (warps * 2 * WARP_KEYS * row_bytes(head_dim)), blocks=1 if rows <= 8 else 2)


def defines(tuning: Tuning, *, bf16: bool, head_dim: int, group: int) -> nvrtc.Defines:
    """What attention_decode.cu is compiled for."""
    return (
        ("BF16", int(bf16)),
        ("HEAD_DIM", head_dim),
        ("GROUP", group),
        ("WARPS", tuning.warps),
        ("STAGES", tuning.stages),
    )


def row_bytes(head_dim: int) -> int:
    """What a key takes in shared memory: chunks of 16 bytes, swizzled by eights."""
    return -(-head_dim // 64) * 128


def shared_bytes(tuning: Tuning, head_dim: int) -> int:
    """`sizeof(Shared)`."""
    return tuning.warps * (tuning.stages * 2 * WARP_KEYS * row_bytes(head_dim) + HEADS * 8)


class Arguments(ctypes.Structure):
    """`struct Arguments`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "key_cache", "value_cache")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "seq_lens", "query_start", "output", "parts")),
        *((name, ctypes.c_longlong) for name in ("q_token_stride", "q_head_stride", "table_stride")),
        *((name, ctypes.c_int) for name in ("rows", "kv_heads", "block_bits", "window")),
        ("scale", ctypes.c_float),
    )


@functools.cache
def parts(device: torch.device, stream: int) -> torch.Tensor:
    """Where blocks leave their results for each other: all missing between launches, which follow each other."""
    blocks = MAX_BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count
    return torch.full((blocks, HEADS * MAX_HEAD_DIM // 4, 6), -1, dtype=torch.int32, device=device)


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
    if max_query_len == 1 and seq_lens.shape[0] > MANY_ROWS:
        return by_triton(
            *(q, key_cache, value_cache, block_tables, seq_lens, query_start),
            *(min_query_len, max_query_len, max_seq_len, scale, sliding_window),
        )
    output = q.new_empty(q.shape)
    if max_query_len > 1:
        prefill(
            q, key_cache, value_cache, block_tables, seq_lens, query_start, output, max_query_len, scale, sliding_window
        )
    if min_query_len <= 1:
        decode(q, key_cache, value_cache, block_tables, seq_lens, query_start, output, scale, sliding_window)
    return output


def decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    *,
    tuning: Tuning | None = None,
) -> None:
    """Fill the rows of `output` [T, Hq, D] that belong to sequences of one new token.

    It begins with all keys but each row's newest while the kernel before still runs: a kernel launched the ordinary way
    must lie between what wrote them, the tables or the lengths and this one.
    """
    head_dim, kv_heads, block_size = q.shape[2], key_cache.shape[1], key_cache.shape[2]
    assert q.stride(2) == block_tables.stride(1) == 1, (q.stride(), block_tables.stride())
    assert key_cache.is_contiguous(), key_cache.stride()
    assert value_cache.is_contiguous(), value_cache.stride()
    assert block_size >= 8, block_size
    tuning = tuning or tuning_for(head_dim, seq_lens.shape[0])
    arguments = Arguments(
        q=q.data_ptr(),
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        block_tables=block_tables.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        query_start=query_start.data_ptr(),
        output=output.data_ptr(),
        parts=parts(q.device, torch.cuda.current_stream(q.device).cuda_stream).data_ptr(),
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        table_stride=block_tables.stride(0),
        rows=seq_lens.shape[0],
        kv_heads=kv_heads,
        block_bits=block_size.bit_length() - 1,
        window=sliding_window or 0,
        scale=scale * LOG2_E,
    )
    choices = defines(tuning, bf16=q.dtype == torch.bfloat16, head_dim=head_dim, group=q.shape[1] // kv_heads)
    nvrtc.kernel(SOURCE, "attention_decode", choices, q.device).launch(
        grid=tuning.blocks * torch.cuda.get_device_properties(q.device).multi_processor_count,
        threads=32 * tuning.warps,
        shared_bytes=shared_bytes(tuning, head_dim),
        arguments=arguments,
        overlap=True,
    )
