"""`EngineStats`: the engine's gauges and counters at one moment."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """The first four are of now, the others count since the engine was made."""

    num_running: int  # sequences
    num_waiting: int
    num_kv_blocks_used: int  # held by running sequences; idle cached blocks count as free
    num_kv_blocks: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int  # of accepted requests
    num_generated_tokens: int
    num_prefix_query_tokens: int  # prompt tokens looked up in the prefix cache
    num_prefix_hit_tokens: int  # … and found there
