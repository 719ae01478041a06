"""Scheduler: who is in a step, in which order, under which budgets; who has to go. Small, readable cases."""

import pytest
from support.engine_harness import Harness, alone, request

from nybble.core.batch import Batch
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams

PROMPT = list(range(10, 34))


def rows(harness: Harness) -> list[tuple[int, int, bool]]:
    """(slot, number of new tokens, samples) of the last batch; slots are given in order of admission."""
    return [(row.slot, len(row.token_ids), row.sample) for row in harness.runner.batches[-1].rows]


def running_ids(harness: Harness) -> list[str]:
    return [sequence.request.request_id for sequence in harness.scheduler.running]


def endless(request_id: str, prompt: list[int], max_tokens: int = 20, **params: object) -> Request:
    return request(request_id, prompt, max_tokens=max_tokens, ignore_eos=True, **{"seed": 0, **params})


def with_priority(request_id: str, prompt: list[int], priority: int, **params: object) -> Request:
    settings = SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "seed": 0, **params})  # type: ignore[arg-type]
    return Request(request_id=request_id, prompt_token_ids=prompt, params=settings, priority=priority)


def test_decodes_then_running_prefills_then_waiting() -> None:
    harness = Harness(max_num_batched_tokens=10)
    harness.add(endless("short", [1, 2]))
    harness.step()
    assert rows(harness) == [(0, 2, True)]
    harness.add(endless("long", PROMPT[:12]))
    harness.add(endless("next", [3, 4, 5, 6, 7]))
    harness.step()
    assert rows(harness) == [(0, 1, True), (1, 9, False)]
    harness.step()
    assert rows(harness) == [(0, 1, True), (1, 3, True), (2, 5, True)]
    harness.step()
    assert rows(harness) == [(0, 1, True), (1, 1, True), (2, 1, True)]


def test_a_prefill_is_cut_to_the_budget() -> None:
    harness = Harness(max_num_batched_tokens=7, max_num_seqs=1)
    harness.add(endless("r", PROMPT[:16], max_tokens=2))
    seen = []
    while harness.engine.has_work:
        harness.step()
        row = harness.runner.batches[-1].rows[0]
        seen.append((row.start, len(row.token_ids), row.sample, row.num_output_tokens))
    assert seen == [(0, 7, False, 0), (7, 7, False, 0), (14, 2, True, 0), (16, 1, True, 1)]


def test_seats_are_limited_and_first_come_first_served() -> None:
    harness = Harness(max_num_seqs=2)
    for name in "abcd":
        harness.add(endless(name, [1, 2], max_tokens=3))
    harness.step()
    assert running_ids(harness) == ["a", "b"]
    harness.run()
    assert [b.starts[0].slot for b in harness.runner.batches if b.starts] == [
        0,
        harness.runner.batches[3].starts[0].slot,
    ]


@pytest.mark.parametrize("is_async", [False, True])
def test_nothing_is_scheduled_past_the_end(is_async: bool) -> None:
    harness = Harness(is_async=is_async)
    harness.add(endless("r", [1, 2, 3], max_tokens=5))
    harness.run()
    assert sum(batch.num_tokens for batch in harness.runner.batches) == 3 + 4
    assert harness.reason("r") == "length"


def test_a_short_pool_preempts_the_latest_and_it_returns_first() -> None:
    harness = Harness(8, max_num_seqs=3, enable_prefix_caching=False)
    requests = [endless(name, PROMPT[:6], max_tokens=12, seed=i) for i, name in enumerate("abc")]
    for r in requests:
        harness.add(r)
    harness.step()
    assert running_ids(harness) == ["a", "b", "c"]
    while harness.scheduler.num_preemptions == 0:
        harness.step()
    assert running_ids(harness) == ["a", "b"]
    harness.add(endless("d", [1], max_tokens=2))
    assert [s.request.request_id for s in harness.scheduler.waiting] == ["c", "d"]
    harness.run()
    assert [harness.tokens(r.request_id) for r in requests] == [alone(r) for r in requests]
    timing = harness.outputs["c"].outputs[0].timing
    assert timing is not None
    assert timing.num_preemptions >= 1


def test_a_restart_brings_what_was_generated() -> None:
    harness = Harness(8, max_num_seqs=3, enable_prefix_caching=False)
    for i, name in enumerate("abc"):
        harness.add(endless(name, PROMPT[:6], max_tokens=12, seed=i))
    harness.run()
    restart = next(start for batch in harness.runner.batches for start in batch.starts if start.output_token_ids)
    assert restart.prompt_token_ids == PROMPT[:6]
    assert restart.output_token_ids == harness.tokens("abc"[restart.seed])[: len(restart.output_token_ids)]


def test_a_preempted_sequence_waits_for_its_token_in_flight() -> None:
    harness = Harness(8, is_async=True, max_num_seqs=3, enable_prefix_caching=False)
    for i, name in enumerate("abc"):
        harness.add(endless(name, PROMPT[:6], max_tokens=12, seed=i))
    while harness.scheduler.num_preemptions == 0:
        num_known = len(harness.tokens("c"))
        harness.step()
    (preempted,) = harness.scheduler.waiting
    assert preempted.num_in_flight == 0  # the step after which it is waiting has applied it
    assert preempted.num_output_tokens == num_known + 1


def test_newcomers_leave_a_reserve_for_those_who_run() -> None:
    harness = Harness(6, max_num_seqs=4, enable_prefix_caching=False)
    harness.add(endless("a", PROMPT[:8], max_tokens=8))
    harness.step()
    harness.add(endless("b", PROMPT[8:24], max_tokens=2))  # 4 blocks: exactly what is left, but "a" will need one
    harness.step()
    assert running_ids(harness) == ["a"]
    harness.run()
    assert harness.scheduler.num_preemptions == 0


def test_priority_takes_a_seat() -> None:
    harness = Harness(scheduling_policy="priority", max_num_seqs=2)
    harness.add(with_priority("low", [1, 2], 5))
    harness.add(with_priority("mid", [3, 4], 3))
    harness.step()
    assert running_ids(harness) == ["mid", "low"]
    harness.add(with_priority("same", [5, 6], 3))
    harness.add(with_priority("high", [7, 8], 0))
    harness.step()
    assert running_ids(harness) == ["high", "mid"]
    assert [s.request.request_id for s in harness.scheduler.waiting] == ["same", "low"]
    assert harness.scheduler.num_preemptions == 1
    harness.run()


def test_priority_takes_blocks() -> None:
    harness = Harness(8, scheduling_policy="priority", max_num_batched_tokens=32)
    low = with_priority("low", PROMPT[:20], 1, max_tokens=4)
    high = with_priority("high", PROMPT[4:24], 0, max_tokens=4)
    harness.add(low)
    harness.step()
    harness.add(high)
    harness.step()
    assert running_ids(harness) == ["high"]
    harness.run()
    assert [harness.tokens(r.request_id) for r in (low, high)] == [alone(low), alone(high)]


def test_priority_does_not_matter_under_fcfs() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(with_priority("first", [1, 2], 5))
    harness.add(with_priority("second", [3, 4], 0))
    harness.step()
    assert running_ids(harness) == ["first"]
    harness.run()
    assert harness.scheduler.num_preemptions == 0


def test_a_second_request_finds_the_first_ones_blocks_in_the_same_step() -> None:
    harness = Harness(max_num_batched_tokens=32)
    harness.add(endless("a", PROMPT[:13]))
    harness.add(endless("b", [*PROMPT[:13], 1]))
    harness.step()
    assert rows(harness) == [(0, 13, True), (1, 2, True)]
    harness.run()
    assert harness.outputs["b"].num_cached_tokens == 12
    assert harness.engine.stats.num_prefix_hit_tokens == 12
    assert harness.engine.stats.num_prefix_query_tokens == 27


def test_a_hit_leaves_a_token_to_compute() -> None:
    harness = Harness()
    harness.add(endless("a", PROMPT[:12], max_tokens=1))
    harness.run()
    harness.add(endless("b", PROMPT[:12], max_tokens=1))
    harness.run()
    assert harness.outputs["b"].num_cached_tokens == 8


def test_salts_keep_tenants_apart() -> None:
    harness = Harness()
    for i, salt in enumerate(["x", "y", "x"]):
        params = SamplingParams(max_tokens=1, seed=0)
        harness.add(Request(request_id=str(i), prompt_token_ids=PROMPT[:13], cache_salt=salt, params=params))
        harness.run()
    assert [harness.outputs[str(i)].num_cached_tokens for i in range(3)] == [0, 0, 12]


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    harness = Harness(is_async=True)
    harness.add(endless("turn 1", PROMPT[:6], max_tokens=9))
    harness.run()
    harness.add(endless("turn 2", PROMPT[:6] + harness.tokens("turn 1"), max_tokens=1))
    harness.run()
    assert harness.outputs["turn 2"].num_cached_tokens == 12


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("scheduling_policy", ["fcfs", "priority"])
@pytest.mark.parametrize("budget", [4, 10, 64])
def test_completions_of_a_request_compute_its_prompt_once(
    enable_prefix_caching: bool, scheduling_policy: str, budget: int
) -> None:
    """21 prompt tokens are 5 full blocks and one token; each further completion computes that one token.

    Each decodes 3 tokens more: without the prefix cache one must be there when the next comes.
    """
    harness = Harness(
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
        scheduling_policy=scheduling_policy,
    )
    harness.add(with_priority("other", [1, 2, 3], 9, max_tokens=30))
    harness.step()
    before = computed_tokens(harness.runner.batches)
    harness.add(with_priority("r", PROMPT[:21], 0, n=3, max_tokens=4))
    while not harness.outputs["r"].finished:
        harness.step()
    num_other = sum(1 for batch in harness.runner.batches[1:] for row in batch.rows if row.slot == 0)
    assert computed_tokens(harness.runner.batches) - before - num_other == 21 + 1 + 1 + 3 * 3
    assert harness.outputs["r"].num_cached_tokens == 0
    harness.run()
    assert enable_prefix_caching or not harness.scheduler.pool._block_of


def computed_tokens(batches: list[Batch]) -> int:
    return sum(batch.num_tokens for batch in batches)


def test_completions_take_seats_from_lower_priorities_and_still_share() -> None:
    harness = Harness(scheduling_policy="priority", max_num_seqs=3, max_num_batched_tokens=64)
    for i in range(3):
        harness.add(with_priority(f"low {i}", [i, i + 1], 1, max_tokens=10))
    harness.step()
    harness.add(with_priority("high", PROMPT[:21], 0, n=3, max_tokens=5))
    harness.step()
    assert running_ids(harness) == ["high"] * 3
    assert sorted(len(row.token_ids) for row in harness.runner.batches[-1].rows) == [1, 1, 21]
    harness.run()


def test_prompt_logprobs_compute_all_positions_but_fill_the_cache() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.add(endless("a", PROMPT[:13], max_tokens=1))
    harness.run()
    harness.add(endless("b", PROMPT[:17], max_tokens=1, prompt_logprobs=0))
    harness.run()
    assert harness.outputs["b"].num_cached_tokens == 0
    assert harness.runner.batches[-1].rows[0].prompt_logprobs
    harness.add(endless("c", PROMPT[:17], max_tokens=1))
    harness.run()
    assert harness.outputs["c"].num_cached_tokens == 16
