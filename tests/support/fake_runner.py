"""A runner without a model, whose tokens expose every mistake in block accounting.

It keeps a cell for each KV slot, reached through block tables only. A cell holds its token and a digest of that token
and the cell before it, as real K/V depends on all earlier tokens. The next token is a hash of all cells of a sequence,
read back through its block table: a block that is shared wrongly, overwritten too early or not recomputed changes it.
Breaches of the contract in `core.batch` raise `ContractBreach`, which is no `Exception` so that no engine swallows it.
"""

import struct
import zlib
from dataclasses import dataclass, field

from nybble.core.batch import BAD_LOGITS, DEVICE_TOKEN, Batch, Row, SequenceStart, StepResult
from nybble.core.config import MemorySetting, ResolvedConfig
from nybble.core.outputs import Logprob, TokenLogprobs

VOCAB_SIZE = 40
EOS = 7


def small_config(**changes: object) -> ResolvedConfig:
    settings: dict[str, object] = {
        "model": "fake",
        "load_format": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "max_model_len_is_explicit": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "enable_prefix_caching": True,
        "scheduling_policy": "fcfs",
        "memory": MemorySetting("kv_cache_memory_bytes", 1),
        "enforce_eager": True,
        "kernels": {},
        "seed": 0,
    }
    return ResolvedConfig(**{**settings, **changes})  # type: ignore[arg-type]


class ContractBreach(BaseException):
    """The engine sent what the contract forbids."""


class InjectedFault(RuntimeError):
    """A failure that a test asked for."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractBreach(message)


Cell = tuple[int, int]  # token, digest of everything up to it


def digest_of(before: int, token_id: int) -> int:
    return zlib.crc32(struct.pack("<i", token_id), before)


def cells_of(token_ids: list[int]) -> list[Cell]:
    cells: list[Cell] = []
    for token_id in token_ids:
        cells.append((token_id, digest_of(cells[-1][1] if cells else 0, token_id)))
    return cells


def next_token(cells: list[Cell], seed: int, num_output_tokens: int, masked: set[int]) -> int:
    state = zlib.crc32(struct.pack("<qi", seed, num_output_tokens))
    for token_id, digest in cells:
        state = zlib.crc32(struct.pack("<iI", token_id, digest), state)
    token_id = state % VOCAB_SIZE
    while token_id in masked:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def logprob_of(cell: Cell, token_id: int) -> TokenLogprobs:
    return {token_id: Logprob(-(cell[1] % 1000) / 100, cell[1] % 7 + 1)}


@dataclass
class Slot:
    start: SequenceStart
    token_ids: list[int]  # all the sequence has, sampled ones included
    block_table: list[int] = field(default_factory=list)
    num_computed: int | None = None  # None before the first row
    num_sampled_here: int = 0


@dataclass
class FakePending:
    runner: "FakeRunner"
    step_id: int
    outcome: StepResult | Exception

    def result(self) -> StepResult:
        self.runner.events.append(("result", self.step_id))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class FakeRunner:
    """Args:
    faults: step id → "submit" or "result" (where it raises), or "bad" (one row's logits are not finite).
    """

    def __init__(
        self, config: ResolvedConfig, num_blocks: int, *, is_async: bool = False, faults: dict[int, str] | None = None
    ) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.block_size = config.block_size
        self.is_async = is_async
        self.faults = faults or {}
        self.cells: list[Cell | None] = [None] * (num_blocks * config.block_size)
        self.slots: dict[int, Slot] = {}
        self.events: list[tuple[str, int]] = []
        self.batches: list[Batch] = []
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def submit(self, batch: Batch) -> FakePending:
        fault = self.faults.get(batch.step_id)
        self.events.append(("submit", batch.step_id))
        self._check_budgets(batch)
        if fault == "submit":
            raise InjectedFault(f"submit of step {batch.step_id}")
        self.batches.append(batch)
        for start in batch.starts:
            require(0 <= start.slot < self.config.max_num_seqs, f"no slot {start.slot}")
            self.slots[start.slot] = Slot(start, start.prompt_token_ids + start.output_token_ids)
        written: set[int] = set()
        for row in batch.rows:
            self._write(row, written, is_garbage=fault == "result")
        outcome = StepResult(token_ids=[], logprobs=[], prompt_logprobs=[])
        has_bad = fault == "bad"
        for row in batch.rows:
            self._sample(row, outcome, is_bad=has_bad)
            has_bad = has_bad and not row.sample
        if fault == "result":
            return FakePending(self, batch.step_id, InjectedFault(f"result of step {batch.step_id}"))
        return FakePending(self, batch.step_id, outcome)

    def _check_budgets(self, batch: Batch) -> None:
        slots = [row.slot for row in batch.rows]
        require(bool(slots), "empty batch")
        require(len(set(slots)) == len(slots), f"a slot occurs twice: {slots}")
        require(len(slots) <= self.config.max_num_seqs, "too many rows")
        require(batch.num_tokens <= self.config.max_num_batched_tokens, "too many tokens")
        started = [start.slot for start in batch.starts]
        require(len(set(started)) == len(started) and set(started) <= set(slots), "a start without its row")

    def _write(self, row: Row, written: set[int], *, is_garbage: bool) -> None:
        """Store the row's K/V."""
        require(row.slot in self.slots, f"slot {row.slot} was never started")
        slot = self.slots[row.slot]
        require(all(0 <= b < self.num_blocks for b in row.new_block_ids), f"block ids {row.new_block_ids}")
        slot.block_table += row.new_block_ids
        require(len(set(slot.block_table)) == len(slot.block_table), "a block twice in one table")
        require(slot.num_computed in (None, row.start), f"row starts at {row.start}, expected {slot.num_computed}")
        require(len(row.token_ids) > 0, "a row without tokens")
        require(DEVICE_TOKEN not in row.token_ids[:-1], "DEVICE_TOKEN before the last")
        end = row.start + len(row.token_ids)
        require(end <= self.config.max_model_len, "past max_model_len")
        require(end <= len(slot.block_table) * self.block_size, "no block for a token")
        require(row.sample == (end == len(slot.token_ids)), "samples elsewhere than at the end")
        require(row.num_output_tokens == len(slot.token_ids) - len(slot.start.prompt_token_ids), "num_output_tokens")
        for position, token_id in enumerate(row.token_ids, row.start):
            if token_id == DEVICE_TOKEN:
                require(slot.num_sampled_here > 0, "DEVICE_TOKEN where nothing was sampled")
                token_id = slot.token_ids[-1]
            require(token_id == slot.token_ids[position], f"token {token_id} at {position}: {slot.token_ids}")
            cell = self._address(slot, position)
            require(cell not in written, f"cell {cell} is written twice in a step")
            written.add(cell)
            before = self.cells[self._address(slot, position - 1)] if position else (0, 0)
            digest = digest_of(before[1] if before is not None else 0, token_id)
            self.cells[cell] = (token_id, digest ^ 0xBAD if is_garbage else digest)
        slot.num_computed = end

    def _sample(self, row: Row, outcome: StepResult, *, is_bad: bool) -> None:
        slot = self.slots[row.slot]
        params = slot.start.params
        end = row.start + len(row.token_ids)
        prompt_logprobs = None
        if row.prompt_logprobs:
            prompt = slot.start.prompt_token_ids
            last = min(end, len(prompt) - 1)
            cells = self._read(slot, last)
            prompt_logprobs = [logprob_of(cells[p], prompt[p + 1]) for p in range(row.start, last)]
        outcome.prompt_logprobs.append(prompt_logprobs)
        token_id = None
        if row.sample:
            cells = self._read(slot, end)
            masked = set(slot.start.end_token_ids) if row.num_output_tokens < params.min_tokens else set()
            token_id = next_token(cells, slot.start.seed, row.num_output_tokens, masked)
            slot.token_ids.append(token_id)
            slot.num_sampled_here += 1
        wants_logprobs = token_id is not None and params.logprobs is not None
        outcome.logprobs.append(logprob_of(cells[-1], token_id) if wants_logprobs else None)
        outcome.token_ids.append(BAD_LOGITS if row.sample and is_bad else token_id)

    def _read(self, slot: Slot, num_tokens: int) -> list[Cell]:
        cells = [self.cells[self._address(slot, position)] for position in range(num_tokens)]
        return [cell if cell is not None else (-9, 0) for cell in cells]

    def _address(self, slot: Slot, position: int) -> int:
        return slot.block_table[position // self.block_size] * self.block_size + position % self.block_size
