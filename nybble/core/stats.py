"""`EngineStats`: the engine's gauges and counters at one moment."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """The first four are of now, the others count since the engine was made."""

    num_running: int = 0  # sequences
    num_waiting: int = 0
    num_kv_blocks_used: int = 0  # held by running sequences; idle cached blocks count as free
    num_kv_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0  # of accepted requests
    num_generated_tokens: int = 0
    num_prefix_query_tokens: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hit_tokens: int = 0  # … and found there
