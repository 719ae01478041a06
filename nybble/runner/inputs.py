"""One step's integers on their way from a `Batch` to the device: gathered with numpy, copied once.

Owns: block tables (on the device, mirrored on the host) and the staging memory. Does not know: the model, sampling.

All arrays of a step are packed into one pinned buffer and travel in one asynchronous copy; the device side is read
through typed views. Where a view lies depends on the layout alone, so that a captured graph finds its inputs again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from nybble.core.batch import Batch
from nybble.core.config import ResolvedConfig
from nybble.runner.graphs import StepSize

_ALIGNMENT_BYTES = 16
_TORCH_TYPES = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class HostStep:
    """A batch as numpy arrays: T tokens of R rows, S of which sample. Named as in `ForwardContext`."""

    token_ids: np.ndarray  # [T] int64, DEVICE_TOKEN included
    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64
    slots: np.ndarray  # [R] int64
    seq_lens: np.ndarray  # [R] int32
    query_start: np.ndarray  # [R + 1] int32
    sample_rows: np.ndarray  # [S] int64, which rows sample
    num_output_tokens: np.ndarray  # [S] int64
    table_positions: np.ndarray  # [D] int64, entries of the flat block tables that change
    table_block_ids: np.ndarray  # [D] int32
    starts: bool  # a sequence gets its first tokens here

    @property
    def size(self) -> StepSize:
        """A sequence that starts with one token does not decode: its prefix may be in blocks that this very step fills
        for another one, and decode attention takes all keys but the newest for old ones (attention_decode.cu)."""
        num_tokens, num_rows = len(self.token_ids), len(self.slots)
        is_decode = len(self.sample_rows) == num_rows == num_tokens and not self.starts
        return StepSize(num_tokens, num_rows, is_decode)

    def padded(self, size: StepSize, idle_slot: int) -> HostStep:
        """The step filled up to a larger size.

        Rows are added that attend to nothing, write nothing and sample into the idle slot. In a decode step each of
        them has a token; in others they have none, and the tokens that are added belong to nobody.
        """

        def filled(length: int, values: dict[str, int]) -> dict[str, np.ndarray]:
            arrays = {name: getattr(self, name) for name in values}
            return {
                name: np.pad(array, (0, length - len(array)), constant_values=values[name])
                for name, array in arrays.items()
            }

        arrays = filled(size.num_tokens, {"token_ids": 0, "positions": 0, "slot_mapping": -1})
        arrays |= filled(size.num_rows, {"slots": idle_slot, "seq_lens": 0})
        arrays |= filled(size.num_rows + 1, {"query_start": len(self.token_ids)})
        if size.is_decode:
            arrays["query_start"] = np.arange(size.num_rows + 1, dtype=np.int32)
        return HostStep(**{**self.__dict__, **arrays})


def idle_step(size: StepSize, idle_slot: int) -> HostStep:
    """A step of padding alone."""
    nothing, short = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    arrays = dict.fromkeys(
        ("token_ids", "positions", "slot_mapping", "slots", "sample_rows", "num_output_tokens"), nothing
    )
    tables = {"table_positions": nothing, "table_block_ids": short}
    empty = HostStep(seq_lens=short, query_start=np.zeros(1, dtype=np.int32), **arrays, **tables, starts=False)
    return empty.padded(size, idle_slot)


def step_arrays(step: HostStep) -> dict[str, np.ndarray]:
    """What every forward pass needs, in the order in which it is laid out (fixed for a given T and R)."""
    names = ("token_ids", "positions", "slot_mapping", "slots", "seq_lens", "query_start")
    return {name: getattr(step, name) for name in names}


class BlockTables:
    """Which blocks hold each slot's tokens: [max_num_seqs + 1, max_blocks] int32; the last row is for padding."""

    def __init__(self, config: ResolvedConfig, device: torch.device) -> None:
        self.block_size = config.block_size
        self.max_blocks = -(-config.max_model_len // config.block_size)
        self.host = np.zeros((config.max_num_seqs + 1, self.max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(config.max_num_seqs + 1, dtype=np.int64)
        self.device = torch.zeros(self.host.shape, dtype=torch.int32, device=device)

    def reset(self, slot: int) -> None:
        self.num_blocks[slot] = 0  # the old entries stay: what lies past a sequence's length is never read

    def append(self, batch: Batch, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add the rows' new blocks to the mirror; returns flat positions and block ids, to be done on the device."""
        counts = np.fromiter((len(row.new_block_ids) for row in batch.rows), np.int64, len(batch.rows))
        total = int(counts.sum())
        block_ids = np.fromiter(chain.from_iterable(row.new_block_ids for row in batch.rows), np.int32, total)
        first = slots * self.max_blocks + self.num_blocks[slots]
        positions = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(total)
        self.num_blocks[slots] += counts
        assert (self.num_blocks[slots] <= self.max_blocks).all(), "a sequence got more blocks than max_model_len needs"
        self.host.reshape(-1)[positions] = block_ids
        return positions, block_ids


def gather(batch: Batch, tables: BlockTables) -> HostStep:
    """Turn a batch into arrays. Python touches each row a few times and no token."""
    rows, num_rows = batch.rows, len(batch.rows)
    slots = np.fromiter((row.slot for row in rows), np.int64, num_rows)
    starts = np.fromiter((row.start for row in rows), np.int64, num_rows)
    lengths = np.fromiter((len(row.token_ids) for row in rows), np.int64, num_rows)
    sample_rows = np.flatnonzero(np.fromiter((row.sample for row in rows), bool, num_rows))
    num_output_tokens = np.fromiter((row.num_output_tokens for row in rows), np.int64, num_rows)
    table_positions, table_block_ids = tables.append(batch, slots)

    num_tokens = int(lengths.sum())
    query_start = np.zeros(num_rows + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], lengths)
    block_index, offset = np.divmod(positions, tables.block_size)
    block_ids = tables.host[np.repeat(slots, lengths), block_index].astype(np.int64)
    return HostStep(
        token_ids=np.fromiter(chain.from_iterable(row.token_ids for row in rows), np.int64, num_tokens),
        positions=positions,
        slot_mapping=block_ids * tables.block_size + offset,
        slots=slots,
        seq_lens=(starts + lengths).astype(np.int32),
        query_start=query_start,
        sample_rows=sample_rows,
        num_output_tokens=num_output_tokens[sample_rows],
        table_positions=table_positions,
        table_block_ids=table_block_ids,
        starts=bool(batch.starts),
    )


class StagingBuffer:
    """Device memory for the arrays of one step, filled by one asynchronous copy from pinned memory."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def upload(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy the arrays to the device; returns their device views, valid until the next upload."""
        places = _places(arrays)
        end = places[-1][1]
        # torch reuses pinned memory only when the copies out of it are done, so no step overwrites another's.
        host = torch.empty(end, dtype=torch.uint8, pin_memory=self._pinned)
        packed = host.numpy()
        for array, (begin, stop) in zip(arrays.values(), places, strict=True):
            packed[begin:stop].view(array.dtype)[:] = array.reshape(-1)
        self._device[:end].copy_(host, non_blocking=True)
        return self.views(arrays)

    def views(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Where arrays of these sizes lie on the device."""
        return {
            name: self._device[begin:end].view(_TORCH_TYPES[array.dtype]).view(array.shape)
            for (name, array), (begin, end) in zip(arrays.items(), _places(arrays), strict=True)
        }


def _places(arrays: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """First and one-past-last byte of each array."""
    places, begin = [], 0
    for array in arrays.values():
        places.append((begin, begin + array.nbytes))
        begin += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return places


def staging_bytes(config: ResolvedConfig) -> int:
    """Room for the largest step: every token, every row with its sampling inputs, every block table filled anew."""
    max_blocks = -(-config.max_model_len // config.block_size)
    per_token = 3 * 8
    per_row = 8 + 4 + 4 + 8 + 256  # slots, lengths, starts, who samples; the sampler's inputs stay below 256 bytes
    per_block = 8 + 4
    sections = 24 * _ALIGNMENT_BYTES
    return (
        config.max_num_batched_tokens * per_token
        + (config.max_num_seqs + 1) * (per_row + max_blocks * per_block)
        + sections
    )
