"""What `advise` says of memory: how much for keys and values, in each way that engines ask for it, and which type."""

from __future__ import annotations

from dataclasses import replace

from nybble.core.config import DEFAULT_CPU_KV_BYTES, DEFAULT_GPU_MEMORY_UTILIZATION
from nybble.perf.memory_model import MOST_UTILIZATION, MemoryPlan
from nybble.perf.roofline import Roofline
from nybble.perf.setting import Setting
from nybble.perf.step_cost import Work
from nybble.perf.workload_model import Load


def choose_utilization(plan: MemoryPlan, load: Load, num_seqs: int) -> Setting:
    """Of a number of sequences that MOST_UTILIZATION has room for."""
    needed = num_seqs * load.tokens
    least = plan.utilization_for(needed)
    value = max(DEFAULT_GPU_MEMORY_UTILIZATION, min(MOST_UTILIZATION, round(least + 0.005, 2)))
    why = f"{needed:,} tokens of KV need {least:.2f}; {value:g} gives {plan.kv_tokens(value):,}"
    return Setting("gpu_memory_utilization", value, f"{why}, and what is not in use keeps prefixes")


def choose_bytes(plan: MemoryPlan, load: Load, num_seqs: int) -> Setting:
    needed = num_seqs * load.tokens * plan.kv_bytes_per_token
    value = min(max(2 * needed, DEFAULT_CPU_KV_BYTES), int(plan.room_bytes))
    return Setting(
        "kv_cache_memory_bytes",
        value,
        f"{num_seqs * load.tokens:,} tokens of KV need {needed / 1e9:.3g} GB; what is not in use keeps prefixes",
    )


def entry_count(plan: MemoryPlan, load: Load, num_seqs: int) -> Setting:
    """LMDeploy's way to say it: a share of what the weights leave, out of which a step's workspace must come too."""
    safe = plan.room_bytes / plan.free_bytes
    needed = plan.entry_count_for(num_seqs * load.tokens)
    value = min(max(needed, 0.8), int(safe * 100) / 100)
    return Setting(
        "cache_max_entry_count",
        round(value, 2),
        f"the same for engines that take a share of what weights leave free: the load needs {needed:.2f}, and above "
        f"{safe:.2f} a step at its worst ({plan.workspace_bytes / 1e9:.2f} GB) has no room",
    )


def kv_dtype(roofline: Roofline, plan: MemoryPlan, load: Load, num_seqs: int) -> Setting:
    context_len = load.input_len + (load.output_len + 1) // 2
    work = Work.decode(num_seqs, context_len)
    narrow = replace(roofline, kv_itemsize=1)
    gain = roofline.seconds(work) / narrow.seconds(work) - 1
    fits = plan.most_kv_tokens // load.tokens
    return Setting(
        "kv_cache_dtype",
        "auto",
        f"16 bit, the only one that nybble has; 8 bits would hold {2 * fits:,} requests instead of {fits:,} and make "
        f"decode steps {gain:.1%} faster at the most",
    )
