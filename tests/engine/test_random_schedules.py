"""Random arrivals, lengths, aborts, priorities, shared prefixes, faults and tiny pools, synchronous and asynchronous.

Whatever happens, each request ends once and within a bounded number of steps; its tokens are those it gets alone; and
the pool knows where every block is, after every step (`Harness.step` checks the books).
"""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engine_harness import Harness, alone
from support.fake_runner import VOCAB_SIZE, ContractBreach, cells_of, logprob_of

from nybble.core.errors import EngineDeadError, RequestError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams

STREAMS = [[(7 * i + 3 * j + i * j) % VOCAB_SIZE for i in range(40)] for j in (1, 2)]


@dataclass
class Visit:
    """A request, the step before which it arrives, and how many steps later it is aborted."""

    request: Request
    arrival: int
    abort_after: int | None


@st.composite
def visits(draw: st.DrawFn, index: int) -> Visit:
    stream = draw(st.sampled_from(STREAMS))
    shared = draw(st.integers(1, 24))
    own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6))
    max_tokens = draw(st.integers(1, 14))
    params = SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3, 5])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.sampled_from([max_tokens, max_tokens, None])),
        min_tokens=draw(st.sampled_from([0, 0, 1, max_tokens])),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([None, [1, 2, 3], [5]])),
        logprobs=draw(st.sampled_from([None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )
    request = Request(
        request_id=f"r{index}",
        prompt_token_ids=stream[:shared] + own,
        params=params,
        priority=draw(st.integers(0, 2)),
        cache_salt=draw(st.sampled_from(["", "", "other"])),
    )
    return Visit(request, draw(st.integers(0, 30)), draw(st.one_of(st.none(), st.integers(0, 12))))


@st.composite
def engines(draw: st.DrawFn, faults: st.SearchStrategy[dict[int, str]]) -> Harness:
    max_num_seqs = draw(st.integers(1, 6))
    return Harness(
        draw(st.integers(3, 24)),
        is_async=draw(st.booleans()),
        faults=draw(faults),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 40)),
        max_model_len=draw(st.integers(20, 64)),
        enable_prefix_caching=draw(st.booleans()),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
    )


plans = st.integers(1, 8).flatmap(lambda n: st.tuples(*(visits(i) for i in range(n))))
no_faults = st.just(dict[int, str]())
kinds = st.sampled_from(["submit", "result", "bad"])
some_faults = st.one_of(
    st.dictionaries(st.integers(0, 40), kinds, max_size=6),
    st.dictionaries(st.integers(2, 6), kinds, min_size=3),  # often three in a row: the engine stops
)


def play(harness: Harness, plan: tuple[Visit, ...]) -> list[Request]:
    """Run all visits to their ends; returns the requests that were taken in."""
    taken: list[Request] = []
    total = sum((len(v.request.prompt_token_ids) + 64) * v.request.params.n for v in plan)
    for now in range(40 + 4 * total):
        for visit in plan:
            if visit.arrival == now:
                try:
                    harness.add(visit.request)
                except RequestError:
                    continue
                except EngineDeadError:
                    assert harness.engine._why_dead
                    continue
                taken.append(visit.request)
            if visit.abort_after is not None and visit.arrival + visit.abort_after == now:
                harness.engine.abort(visit.request.request_id)
        if harness.engine.has_work:
            harness.step()
        elif now > 30:
            break
    harness.run(max_steps=1)
    return taken


def tokens_alone(harness: Harness, request: Request) -> list[list[int]]:
    seeds = harness.engine._seeds(request.params)
    return [alone(request, seed, max_model_len=harness.config.max_model_len) for seed in seeds]


def check_all_told(harness: Harness, requests: list[Request], may_fail: bool) -> None:
    for request in requests:
        for index, expected in enumerate(tokens_alone(harness, request)):
            assert harness.num_ends[request.request_id, index] == 1
            output = harness.outputs[request.request_id].outputs[index]
            if output.finish_reason in ("abort", "error"):
                assert output.token_ids == expected[: len(output.token_ids)]
                assert may_fail or output.finish_reason == "abort"
                assert (output.error is None) == (output.finish_reason == "abort")
            else:
                assert output.token_ids == expected
                ends = {*(request.params.stop_token_ids or ()), *(() if request.params.ignore_eos else (7,))}
                stopped = expected[-1] in ends and len(expected) >= request.params.min_tokens
                assert output.finish_reason == ("stop" if stopped else "length")
            check_logprobs(harness, request, index)


def check_logprobs(harness: Harness, request: Request, index: int) -> None:
    output = harness.outputs[request.request_id].outputs[index]
    prompt = request.prompt_token_ids
    cells = cells_of(prompt + output.token_ids)
    if request.params.logprobs is not None:
        expected = [logprob_of(cells[len(prompt) - 1 + i], t) for i, t in enumerate(output.token_ids)]
        assert (output.logprobs or []) == expected
    told = harness.outputs[request.request_id].prompt_logprobs
    if request.params.prompt_logprobs is not None and index == 0 and output.token_ids:
        assert told == [None] + [logprob_of(cells[p], prompt[p + 1]) for p in range(len(prompt) - 1)]
    elif request.params.prompt_logprobs is None:
        assert told is None


FAST = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))


def check_without_faults(harness: Harness, plan: tuple[Visit, ...]) -> None:
    requests = play(harness, plan)
    check_all_told(harness, requests, may_fail=False)


def check_with_faults(harness: Harness, plan: tuple[Visit, ...]) -> None:
    requests = play(harness, plan)
    check_all_told(harness, requests, may_fail=True)


test_tokens_equal_those_alone = FAST(given(engines(no_faults), plans)(check_without_faults))
test_faults_harm_no_one_else = FAST(given(engines(some_faults), plans)(check_with_faults))
test_tokens_equal_those_alone_thorough = pytest.mark.slow(
    THOROUGH(given(engines(no_faults), plans)(check_without_faults))
)
test_faults_harm_no_one_else_thorough = pytest.mark.slow(
    THOROUGH(given(engines(some_faults), plans)(check_with_faults))
)


def test_the_fake_runner_would_notice() -> None:
    """Blocks handed out twice change the tokens: the checks above cannot pass by accident."""
    harness = Harness(16, max_num_seqs=2)
    prompts = [STREAMS[0][:9], STREAMS[1][:9]]
    requests = [
        Request(request_id=f"r{i}", prompt_token_ids=p, params=SamplingParams(seed=i, max_tokens=8, ignore_eos=True))
        for i, p in enumerate(prompts)
    ]
    for request in requests:
        harness.add(request)
    harness.step()
    thief, victim = harness.scheduler.running
    table = harness.runner.slots[thief.slot].block_table  # type: ignore[index]
    table[-1] = harness.runner.slots[victim.slot].block_table[-1]  # type: ignore[index]
    try:
        harness.run()
    except ContractBreach:
        return
    assert any(harness.tokens(r.request_id) != alone(r) for r in requests)
