"""How much memory the KV cache gets: plain arithmetic over measured facts, and refusals that say what would fit.

    device = in use (weights, CUDA context, other processes) + workspace + margin + KV + what the setting leaves free

The workspace is measured (`measure.py`), never guessed. Whatever is accepted here must hold under the worst burst, so
the workspace is what the allocator *reserved* at its peak, and a margin pays for what no measurement sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.core.config import MemorySetting
from nybble.core.errors import MemoryBudgetError

MARGIN_BYTES = 256 << 20
"""Kept free on a GPU: kernels that are loaded later, and the allocator's fragmentation under mixes of step sizes."""


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """What was found on the device, in bytes, with the weights loaded and no KV cache yet."""

    total_bytes: int
    used_bytes: int  # by everyone: the weights, this process's context, other processes
    workspace_bytes: int = 0  # the runner's own state, a step's temporaries at their worst, CUDA graphs
    margin_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    @property
    def room_bytes(self) -> int:
        """The most that a KV cache can take."""
        return self.free_bytes - self.workspace_bytes - self.margin_bytes


@dataclass(frozen=True, kw_only=True)
class KVNeed:
    """What a cache is made of, and the longest sequence it should hold."""

    bytes_per_block: int
    block_size: int
    max_model_len: int
    max_model_len_is_explicit: bool

    @property
    def blocks_per_sequence(self) -> int:
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, kw_only=True)
class KVBudget:
    num_blocks: int
    max_model_len: int  # shortened, if the user left it open and the cache cannot hold more
    kv_bytes: int


def kv_budget(setting: MemorySetting, facts: MemoryFacts, need: KVNeed) -> KVBudget:
    """Size the KV cache.

    Raises:
        MemoryBudgetError: the setting asks for more than there is, or leaves less than one sequence needs (of
            max_model_len where the user gave it, else of one block). Says which values would fit.
    """
    asked = _asked_bytes(setting, facts)
    if asked > facts.room_bytes:
        raise MemoryBudgetError(_too_much(setting, facts, need, asked))
    num_blocks = max(asked, 0) // need.bytes_per_block
    least_blocks = need.blocks_per_sequence if need.max_model_len_is_explicit else 1
    if num_blocks < least_blocks:
        raise MemoryBudgetError(_too_little(setting, facts, need, asked, least_blocks * need.bytes_per_block))
    return KVBudget(
        num_blocks=num_blocks,
        max_model_len=min(need.max_model_len, num_blocks * need.block_size),
        kv_bytes=num_blocks * need.bytes_per_block,
    )


def _asked_bytes(setting: MemorySetting, facts: MemoryFacts) -> int:
    if setting.name == "gpu_memory_utilization":
        return int(setting.value * facts.total_bytes) - facts.used_bytes - facts.workspace_bytes - facts.margin_bytes
    if setting.name == "cache_max_entry_count":
        return int(setting.value * facts.free_bytes)
    return int(setting.value)


def _too_much(setting: MemorySetting, facts: MemoryFacts, need: KVNeed, asked: int) -> str:
    return (
        f"{setting} asks for {_gb(asked)} of KV cache, but of {_gb(facts.free_bytes)} free after the weights "
        f"{_gb(facts.workspace_bytes + facts.margin_bytes)} are kept for a step at its worst, which leaves "
        f"{_gb(facts.room_bytes)}; " + _remedies(setting, facts, need)
    )


def _too_little(setting: MemorySetting, facts: MemoryFacts, need: KVNeed, asked: int, least: int) -> str:
    tokens = need.max_model_len if need.max_model_len_is_explicit else need.block_size
    return (
        f"{setting} leaves {_gb(max(asked, 0))} for KV, but a sequence of {tokens} tokens needs {_gb(least)}: "
        f"of {_gb(facts.total_bytes)}, {_gb(facts.used_bytes)} are in use (weights included) and "
        f"{_gb(facts.workspace_bytes + facts.margin_bytes)} are kept for a step at its worst; "
        + _remedies(setting, facts, need)
    )


def _remedies(setting: MemorySetting, facts: MemoryFacts, need: KVNeed) -> str:
    """What to change, with numbers that this very function's caller would accept."""
    least_blocks = need.blocks_per_sequence if need.max_model_len_is_explicit else 1
    remedies = []
    if fits := _fitting_values(setting, facts, least_blocks * need.bytes_per_block):
        remedies.append(fits)
    longest = max(facts.room_bytes, 0) // need.bytes_per_block * need.block_size
    if need.max_model_len_is_explicit and 0 < longest < need.max_model_len:
        remedies.append(f"max_model_len ≤ {longest} would fit on this device")
    if facts.workspace_bytes:
        remedies.append("lower max_num_batched_tokens or max_num_seqs to make a step need less")
    return "; or ".join(remedies)


def _fitting_values(setting: MemorySetting, facts: MemoryFacts, least_bytes: int) -> str:
    """The range of the setting that holds `least_bytes`, or nothing if no value does."""
    if least_bytes > facts.room_bytes:
        return ""
    if setting.name == "gpu_memory_utilization":
        low = (facts.total_bytes - facts.room_bytes + least_bytes) / facts.total_bytes
        return _hundredths("gpu_memory_utilization", low, 1.0)
    if setting.name == "cache_max_entry_count":
        return _hundredths(setting.name, least_bytes / facts.free_bytes, facts.room_bytes / facts.free_bytes)
    return f"kv_cache_memory_bytes from {least_bytes} to {facts.room_bytes} fits"


def _hundredths(name: str, low: float, high: float) -> str:
    """A range rounded inwards, so that both ends hold."""
    lowest, highest = math.ceil(low * 100 - 1e-9) / 100, math.floor(high * 100 + 1e-9) / 100
    if lowest > highest:
        return ""
    return f"{name} from {max(lowest, 0.01):.2f} to {highest:.2f} fits"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if abs(num_bytes) >= 10**7 else f"{num_bytes / 1e6:.3f} MB"
