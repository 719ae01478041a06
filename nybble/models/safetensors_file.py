"""Reading safetensors: header checks that trust nothing, and fast copies from file to device.

Layout: 8 bytes little-endian header size, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes
back to back. Owns: one open file. Does not know: models, formats.

The safetensors package maps files into memory; nybble reads them instead, because several threads reading into pinned
memory fill a GPU some times faster than page faults do, mapped pages count as the process's memory, and a file
that shrinks while it is mapped kills the process. Tests hold this reader against that package.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.core.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
MAX_DIMS = 64  # torch's own limit
STAGE_BYTES = 64 << 20  # each of two pinned buffers
PIECE_BYTES = 8 << 20  # what one thread reads at a time
READ_THREADS = 8


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies; offsets count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """An open file whose header was checked completely.

    Raises:
        ModelError: the file is not sound safetensors; names the file and the place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from error
        try:
            self.entries = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill a contiguous uint8 CPU tensor with the file's bytes from `offset` on. Safe from several threads."""
        view = memoryview(buffer.numpy())
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise ModelError(f"{self.path}: ends at byte {offset + done} although its header promises more")
            done += count

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{self.path}: truncated or not safetensors: {size} bytes, header of {length} bytes")
        try:
            header = json.loads(os.pread(self._fd, length, 8), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{self.path}: the header is not valid JSON ({error})") from error
        if not isinstance(header, dict):
            raise ModelError(f"{self.path}: the header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}
        # Back to back from the first byte to the last: no overlaps, no gaps, nothing past the end.
        at = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != at:
                raise ModelError(f"{self.path}: {name}: data begins at byte {entry.start}, but {at} is next")
            at = entry.end
        if at != size:
            raise ModelError(f"{self.path}: truncated or damaged: has {size} bytes, its header describes {at}")
        return entries

    def _entry(self, name: str, fields: Any, base: int) -> Entry:
        where = f"{self.path}: {name}"
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise ModelError(f"{where}: must have dtype, shape and data_offsets, has {_short(fields)}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelError(f"{where}: unknown dtype {_short(dtype)}; known are {', '.join(DTYPES)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ModelError(
                f"{where}: shape {_short(shape)}, data_offsets {_short(offsets)} must be lists of integers ≥ 0"
            )
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ModelError(f"{where}: {dtype} {_short(shape)} does not fill data_offsets {offsets}")
        return Entry(DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


class TensorReader:
    """Copies tensors of open files onto a device, with several reading threads.

    On a GPU bytes go through two pinned buffers in turn, so that the next piece is read while the last one is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(min(READ_THREADS, os.cpu_count() or 1), thread_name_prefix="nybble-read")
        self._staging = self._stages() if device.type == "cuda" else None

    def read(self, file: SafetensorsFile, entry: Entry) -> torch.Tensor:
        """The tensor, contiguous on the device, in its stored type.

        Raises:
            ModelError: the file ended early.
        """
        out = torch.empty(entry.end - entry.start, dtype=torch.uint8, device=self.device)
        if self._staging is None:
            self._fill(file, out, entry.start)
        else:
            for begin in range(0, len(out), STAGE_BYTES):
                part = out[begin : begin + STAGE_BYTES]
                buffer, copied = next(self._staging)
                copied.synchronize()
                stage = buffer[: len(part)]
                self._fill(file, stage, entry.start + begin)
                part.copy_(stage, non_blocking=True)
                copied.record()
        return out.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        self._pool.shutdown()
        if self._staging is not None:
            torch.cuda.synchronize(self.device)  # pinned memory must outlive its copies

    def _fill(self, file: SafetensorsFile, buffer: torch.Tensor, offset: int) -> None:
        pieces = range(0, len(buffer), PIECE_BYTES)
        if len(pieces) <= 1:
            file.read_into(buffer, offset)
            return
        jobs = [self._pool.submit(file.read_into, buffer[at : at + PIECE_BYTES], offset + at) for at in pieces]
        for job in jobs:
            job.result()

    def _stages(self) -> Iterator[tuple[torch.Tensor, torch.cuda.Event]]:
        stages = [(torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
        while True:
            yield from stages


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _are_sizes(value: Any) -> bool:
    """Bounded as well: JSON integers have no limit, and arithmetic with thousands of digits takes its time."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
