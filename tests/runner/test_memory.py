"""The arithmetic of the KV budget, with made-up devices; and that what a refusal proposes would indeed be accepted."""

import re
from dataclasses import replace

import pytest
import torch
from support.paged_model import PagedModel
from support.runner_driver import small_config

from nybble.core.config import MemorySetting
from nybble.core.errors import MemoryBudgetError
from nybble.runner.kv_cache import KVCache, bytes_per_block
from nybble.runner.measure import common_batches, host_memory, plan_memory, worst_batches
from nybble.runner.memory import KVNeed, MemoryFacts, kv_budget
from nybble.runner.model_runner import ModelRunner

GB = 10**9
# A 24 GB device with 10 GB in use: 14 free, of which a step needs 3 at its worst.
FACTS = MemoryFacts(total_bytes=24 * GB, used_bytes=10 * GB, workspace_bytes=2 * GB, margin_bytes=1 * GB)
NEED = KVNeed(bytes_per_block=4 * 10**6, block_size=16, max_model_len=8192, max_model_len_is_explicit=True)  # 2.048 GB


def setting(name: str, value: float) -> MemorySetting:
    return MemorySetting(name, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "kv_bytes"),
    [
        ("gpu_memory_utilization", 0.9, 21.6 * GB - 13 * GB),  # of the whole device, after everything that is in use
        ("gpu_memory_utilization", 1.0, 11 * GB),
        ("cache_max_entry_count", 0.5, 7 * GB),  # of what is free after the weights
        ("cache_max_entry_count", 0.78, 0.78 * 14 * GB),
        ("kv_cache_memory_bytes", 5 * GB, 5 * GB),
    ],
)
def test_each_setting_means_what_it_says(name: str, value: float, kv_bytes: float) -> None:
    budget = kv_budget(setting(name, value), FACTS, NEED)
    assert budget.num_blocks == int(kv_bytes) // NEED.bytes_per_block
    assert budget.kv_bytes == budget.num_blocks * NEED.bytes_per_block
    assert budget.max_model_len == 8192


def test_other_processes_count_against_the_utilization() -> None:
    busy = replace(FACTS, used_bytes=FACTS.used_bytes + 3 * GB)
    alone = kv_budget(setting("gpu_memory_utilization", 0.9), FACTS, NEED)
    beside = kv_budget(setting("gpu_memory_utilization", 0.9), busy, NEED)
    assert alone.num_blocks - beside.num_blocks == 3 * GB // NEED.bytes_per_block


@pytest.mark.parametrize("name", ["gpu_memory_utilization", "cache_max_entry_count", "kv_cache_memory_bytes"])
@pytest.mark.parametrize("used_gb", [0, 5, 10, 15, 18, 20.5])
@pytest.mark.parametrize("explicit", [True, False])
def test_whatever_is_accepted_fits_beside_the_workspace(name: str, used_gb: float, explicit: bool) -> None:
    facts = replace(FACTS, used_bytes=int(used_gb * GB))
    need = replace(NEED, max_model_len_is_explicit=explicit)
    for percent in range(1, 101):
        value = percent / 100 * 24 * GB if name == "kv_cache_memory_bytes" else percent / 100
        try:
            budget = kv_budget(setting(name, value), facts, need)
        except MemoryBudgetError:
            continue
        in_use = facts.used_bytes + facts.workspace_bytes + facts.margin_bytes + budget.kv_bytes
        assert in_use <= facts.total_bytes
        assert budget.num_blocks * need.block_size >= budget.max_model_len
        if name == "gpu_memory_utilization":
            assert in_use <= value * facts.total_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_max_entry_count", 0.95),
        ("cache_max_entry_count", 0.01),
        ("gpu_memory_utilization", 0.5),
        ("gpu_memory_utilization", 0.6),
        ("kv_cache_memory_bytes", 12 * GB),
        ("kv_cache_memory_bytes", GB),
    ],
)
def test_a_refusal_names_values_that_are_then_accepted(name: str, value: float) -> None:
    with pytest.raises(MemoryBudgetError) as refusal:
        kv_budget(setting(name, value), FACTS, NEED)
    message = str(refusal.value)
    assert name in message
    assert "max_num_batched_tokens" in message
    low, high = re.search(rf"{name} from ([\d.]+) to ([\d.]+) fits", message).groups()
    for proposed in (float(low), float(high)):
        assert kv_budget(setting(name, proposed), FACTS, NEED).max_model_len == 8192
    step = 1 if name == "kv_cache_memory_bytes" else 0.01
    with pytest.raises(MemoryBudgetError):
        kv_budget(setting(name, float(low) - step), FACTS, NEED)
    if float(high) < 1.0 or name == "kv_cache_memory_bytes":
        with pytest.raises(MemoryBudgetError):
            kv_budget(setting(name, float(high) + step), FACTS, NEED)


def test_where_no_value_fits_the_refusal_names_a_context_that_does() -> None:
    tight = replace(FACTS, used_bytes=20 * GB)  # room for 1 GB, half of what a sequence needs
    for name, value in (("gpu_memory_utilization", 0.99), ("cache_max_entry_count", 0.2)):
        with pytest.raises(MemoryBudgetError) as refusal:
            kv_budget(setting(name, value), tight, NEED)
        assert f"{name} from" not in str(refusal.value)
        longest = int(re.search(r"max_model_len ≤ (\d+)", str(refusal.value)).group(1))
        assert longest == GB // NEED.bytes_per_block * 16
    shorter = replace(NEED, max_model_len=longest)
    assert kv_budget(setting("gpu_memory_utilization", 1.0), tight, shorter).max_model_len == longest


def test_a_context_left_open_is_shortened_to_what_fits() -> None:
    need = replace(NEED, max_model_len_is_explicit=False)
    budget = kv_budget(setting("kv_cache_memory_bytes", GB), FACTS, need)
    assert budget.max_model_len == budget.num_blocks * 16 == 4000
    with pytest.raises(MemoryBudgetError, match="16 tokens"):
        kv_budget(setting("kv_cache_memory_bytes", 100), FACTS, need)


def test_no_room_at_all_is_refused_with_the_numbers() -> None:
    full = replace(FACTS, used_bytes=22 * GB)
    with pytest.raises(MemoryBudgetError, match=r"22\.00 GB .*3\.00 GB"):
        kv_budget(setting("gpu_memory_utilization", 0.9), full, NEED)


def test_the_cache_takes_the_bytes_it_was_given() -> None:
    spec = PagedModel().kv_spec
    cache = KVCache(spec, num_blocks=5, block_size=8, device=torch.device("cpu"))
    assert cache.num_bytes == 5 * bytes_per_block(spec, 8)
    assert len(cache.layers) == spec.num_layers
    assert cache.layers[0][1].shape == (5, spec.num_kv_heads, 8, spec.head_dim)


def test_a_cpu_is_sized_from_a_byte_budget() -> None:
    model, config = PagedModel(), small_config(kv_cache_memory_bytes=100_000)
    facts, budget = plan_memory(model, config)
    assert budget.num_blocks == 100_000 // bytes_per_block(model.kv_spec, 8)
    assert 0 < facts.used_bytes < facts.total_bytes
    too_much = small_config(kv_cache_memory_bytes=host_memory().total_bytes + 1)
    with pytest.raises(MemoryBudgetError, match="kv_cache_memory_bytes"):
        plan_memory(model, too_much)


def test_the_worst_steps_are_as_large_as_a_batch_can_be() -> None:
    config = small_config(max_num_batched_tokens=50)
    prefill, decode, prompt_logprobs, _, greedy = worst_batches(config, vocab_size=100)
    assert prefill.num_tokens == 50
    assert len(prefill.rows) == len(decode.rows) == len(greedy.rows) == 8
    assert max(row.start + len(row.token_ids) for row in prefill.rows) == 64
    assert max(row.start + 1 for row in decode.rows) == 64
    assert prompt_logprobs.num_tokens == 50
    assert prompt_logprobs.rows[0].prompt_logprobs


def test_common_steps_are_of_all_lengths_and_run() -> None:
    config = small_config(max_num_batched_tokens=50)
    batches = common_batches(config)
    alone = [batch.num_tokens for batch in batches if len(batch.rows) == 1]
    assert alone == [2, 4, 8, 16, 32]
    beside = [batch.rows[0].start + 1 for batch in batches if len(batch.rows) == 2]
    assert beside == [1, 2, 4, 8, 16, 32, 64]
    assert max(row.start + len(row.token_ids) for batch in batches for row in batch.rows) == config.max_model_len
    runner = ModelRunner(PagedModel(), config, num_blocks=16)
    for batch in batches:
        assert len(runner.submit(batch).result().token_ids) == len(batch.rows)
    assert all(len(batch.rows) == 1 for batch in common_batches(small_config(max_num_seqs=1)))
