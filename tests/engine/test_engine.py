"""Engine: the loop, aborts, failures, what is told and when."""

from collections.abc import Callable
from typing import Any

import pytest
from support.engine_harness import Harness, alone, request
from support.fake_runner import EOS, FakeRunner, InjectedFault, small_config

from nybble.core.batch import NO_TOKEN, Batch, PendingStep, StepResult
from nybble.core.errors import EngineDeadError, RequestError
from nybble.engine.completion import Completion
from nybble.engine.engine import Engine
from nybble.engine.sequence import Sequence

PROMPT = list(range(10, 34))
BOTH = pytest.mark.parametrize("is_async", [False, True])


@BOTH
def test_one_step_stays_in_flight_only_if_the_runner_is_asynchronous(is_async: bool) -> None:
    harness = Harness(is_async=is_async)
    harness.add(request("r", [1, 2], seed=0, max_tokens=3, ignore_eos=True))
    harness.run()
    submit, result = "submit", "result"
    overlapped = [(submit, 0), (submit, 1), (result, 0), (submit, 2), (result, 1), (result, 2)]
    in_turn = [(submit, 0), (result, 0), (submit, 1), (result, 1), (submit, 2), (result, 2)]
    assert harness.runner.events == (overlapped if is_async else in_turn)


@BOTH
def test_the_token_after_the_end_is_dropped(is_async: bool) -> None:
    prompt = next(p for i in range(100) if EOS in alone(request("x", p := [i % 40, i // 40], seed=1, max_tokens=12)))
    r = request("r", prompt, seed=1, max_tokens=12)
    harness = Harness(is_async=is_async)
    harness.add(r)
    harness.run()
    tokens = harness.tokens("r")
    assert tokens == alone(r)
    assert tokens.index(EOS) == len(tokens) - 1
    assert harness.reason("r") == "stop"
    num_rows = sum(len(batch.rows) for batch in harness.runner.batches)
    assert num_rows == len(tokens) + (is_async and len(tokens) < 12)
    assert harness.engine.stats.num_generated_tokens == len(tokens)


def test_seeds() -> None:
    def seeds(**params: object) -> list[int]:
        harness = Harness(max_num_seqs=8)
        for name in "ab":
            harness.add(request(name, PROMPT[:3], max_tokens=1, n=3, **params))
        harness.step()
        return [start.seed for start in harness.runner.batches[0].starts]

    given = seeds(seed=5)
    assert given[0] == 5
    assert given[:3] == given[3:]
    assert len(set(given)) == 3
    drawn = seeds()
    assert len(set(drawn)) == 6
    assert drawn == seeds(), "the engine's own seed decides"


def test_duplicate_ids_are_refused_until_the_end_was_told() -> None:
    harness = Harness()
    harness.add(request("r", PROMPT[:3], max_tokens=4))
    with pytest.raises(RequestError, match="'r' is in use"):
        harness.engine.add(request("r", PROMPT[:3]))
    harness.engine.abort("r")
    with pytest.raises(RequestError, match="in use"):
        harness.engine.add(request("r", PROMPT[:3]))
    harness.step()
    harness.engine.add(request("r", PROMPT[:3]))


def test_a_refused_request_leaves_nothing_behind() -> None:
    harness = Harness(4)
    for bad, parameter in (
        (request("r", PROMPT[:17], max_tokens=1), "prompt_token_ids"),
        (request("r", PROMPT[:3], max_tokens=4, stop="x"), "stop"),
        (request("r", PROMPT[:3], max_tokens=4, bad_words=["x"]), "bad_words"),
    ):
        with pytest.raises(RequestError) as refusal:
            harness.engine.add(bad)
        assert refusal.value.parameter == parameter
        assert not harness.engine.has_work
    harness.add(request("r", PROMPT[:3], max_tokens=4))
    harness.run()


def test_an_add_that_breaks_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two completions cannot be set up."""

    class Breaking(Completion):
        def __init__(self, sequence: Sequence, *rest: Any) -> None:
            super().__init__(sequence, *rest)
            if sequence.index == 1:
                raise RuntimeError("no")

    harness = Harness()
    monkeypatch.setattr("nybble.engine.engine.Completion", Breaking)
    with pytest.raises(RuntimeError):
        harness.engine.add(request("r", PROMPT[:3], max_tokens=4, n=2))
    monkeypatch.undo()
    assert not harness.engine.has_work
    assert harness.engine.stats.num_prompt_tokens == 0
    again = request("r", PROMPT[:3], seed=1, max_tokens=4)
    harness.add(again)
    harness.run()
    assert harness.tokens("r") == alone(again)


def test_abort_of_what_is_no_id_is_ignored() -> None:
    harness = Harness()
    harness.add(request("r", PROMPT[:3], max_tokens=4))
    harness.engine.abort(["r"])  # type: ignore[arg-type]
    harness.run()
    assert harness.reason("r") == "length"


def test_what_becomes_of_the_callers_prompt_later_changes_nothing() -> None:
    harness = Harness(max_num_seqs=1)
    prompt = PROMPT[:3]
    expected = alone(request("r", list(prompt), seed=1, max_tokens=4, ignore_eos=True))
    harness.engine.add(request("r", prompt, seed=1, max_tokens=4, ignore_eos=True))
    prompt.extend([1] * 100)
    tokens: list[int] = []
    while harness.engine.has_work:
        for delta in harness.engine.step():
            assert delta.error is None
            tokens += delta.token_ids
    assert tokens == expected
    assert harness.runner.batches[0].starts[0].prompt_token_ids == PROMPT[:3]


def test_end_tokens_that_the_model_has_no_logits_for_do_not_reach_the_runner() -> None:
    config = small_config()
    runner = FakeRunner(config, 16)
    engine = Engine(runner, config, tokenizer=None, eos_token_ids=[EOS, 2**70], vocab_size=40)
    engine.add(request("r", PROMPT[:3], max_tokens=2, min_tokens=2))
    engine.step()
    assert runner.batches[0].starts[0].end_token_ids == [EOS]


@BOTH
@pytest.mark.parametrize("num_steps", range(5))
def test_abort_at_any_moment(is_async: bool, num_steps: int) -> None:
    """Waiting, in prefill, decoding; with and without a step in flight. The neighbour does not notice."""
    harness = Harness(is_async=is_async, max_num_batched_tokens=8)
    neighbour = request("neighbour", PROMPT[4:9], seed=3, max_tokens=9, ignore_eos=True)
    harness.add(request("r", PROMPT[:12], seed=2, max_tokens=30, n=2, ignore_eos=True))
    harness.add(neighbour)
    for _ in range(num_steps):
        harness.step()
    harness.engine.abort("r")
    harness.engine.abort("r")
    harness.engine.abort("never heard of", "stop")
    deltas = harness.step()
    assert [(d.index, d.finish_reason) for d in deltas if d.request_id == "r"] == [(0, "abort"), (1, "abort")]
    harness.run()
    assert harness.tokens("neighbour") == alone(neighbour)
    harness.engine.abort("r")
    assert not harness.engine.has_work


def test_abort_of_a_preempted_sequence() -> None:
    harness = Harness(8, is_async=True, max_num_seqs=3, enable_prefix_caching=False)
    for i, name in enumerate("abc"):
        harness.add(request(name, PROMPT[:6], max_tokens=12, seed=i, ignore_eos=True))
    while harness.scheduler.num_preemptions == 0:
        harness.step()
    harness.engine.abort("c")
    harness.run()
    assert harness.reason("c") == "abort"
    assert harness.reason("a") == harness.reason("b") == "length"


@BOTH
@pytest.mark.parametrize("kind", ["submit", "result"])
def test_a_failed_step_fails_its_rows_and_no_more(is_async: bool, kind: str) -> None:
    harness = Harness(is_async=is_async, faults={2: kind}, max_num_seqs=2)
    later = request("later", [5, 6], seed=2, max_tokens=4, ignore_eos=True)
    for name in "ab":
        harness.add(request(name, [1, 2, 3], seed=1, max_tokens=20, ignore_eos=True))
    harness.add(later)
    harness.run()
    for name in "ab":
        output = harness.outputs[name].outputs[0]
        assert output.finish_reason == "error"
        assert output.error == f"the step failed: InjectedFault: {kind} of step 2"
        assert output.timing is not None
    assert harness.tokens("later") == alone(later)


def test_who_found_blocks_of_a_failed_step_starts_over() -> None:
    """Step 0 is to fill the prompt's blocks; step 1 is on its way with a row that found them when step 0 fails."""
    harness = Harness(is_async=True, faults={0: "result"})
    second = request("second", [*PROMPT[:9], 1, 2], seed=4, max_tokens=5, ignore_eos=True)
    harness.add(request("first", PROMPT[:9], seed=1, max_tokens=5, ignore_eos=True))
    assert harness.step() == []
    harness.add(second)
    harness.step()
    assert harness.runner.batches[1].rows[-1].start == 8
    harness.run()
    assert harness.reason("first") == "error"
    assert harness.tokens("second") == alone(second)
    assert harness.outputs["second"].outputs[0].timing.num_preemptions == 1  # type: ignore[union-attr]


def test_blocks_of_a_failed_step_are_not_found_later() -> None:
    harness = Harness(faults={0: "result"})
    harness.add(request("first", PROMPT[:9], seed=1, max_tokens=5))
    harness.run()
    again = request("again", PROMPT[:9], seed=1, max_tokens=5)
    harness.add(again)
    harness.run()
    assert harness.outputs["again"].num_cached_tokens == 0
    assert harness.tokens("again") == alone(again)


def test_bad_logits_fail_one_sequence_and_leave_no_blocks_behind() -> None:
    harness = Harness(faults={0: "bad"})
    other = request("other", [1, 2], seed=1, max_tokens=5, ignore_eos=True)
    harness.add(request("bad", PROMPT[:9], seed=1, max_tokens=5))
    harness.add(other)
    harness.run()
    assert "not finite" in str(harness.outputs["bad"].outputs[0].error)
    assert harness.tokens("bad") == []
    assert harness.tokens("other") == alone(other)
    harness.add(request("again", PROMPT[:9], seed=1, max_tokens=5))
    harness.run()
    assert harness.outputs["again"].num_cached_tokens == 0


@BOTH
def test_a_row_without_an_allowed_token_says_so_and_its_blocks_stay(is_async: bool) -> None:
    class MaskingRunner(FakeRunner):
        def submit(self, batch: Batch) -> PendingStep:  # type: ignore[override]
            pending = super().submit(batch)
            if batch.step_id == 0:
                assert isinstance(pending.outcome, StepResult)
                pending.outcome.token_ids[0] = NO_TOKEN
            return pending

    harness = Harness()
    config = small_config()
    harness.runner = MaskingRunner(config, 16, is_async=is_async)
    harness.engine = Engine(harness.runner, config, tokenizer=None, eos_token_ids=[EOS], vocab_size=40)
    other = request("other", [1, 2], seed=1, max_tokens=5, ignore_eos=True)
    harness.add(request("masked", PROMPT[:9], seed=1, max_tokens=5))
    harness.add(other)
    harness.run()
    error = str(harness.outputs["masked"].outputs[0].error)
    assert "allowed_token_ids, bad_words, structured_outputs and min_tokens" in error
    assert "finite" not in error
    assert harness.tokens("masked") == []
    assert harness.tokens("other") == alone(other)
    again = request("again", PROMPT[:9], seed=1, max_tokens=5)
    harness.add(again)
    harness.run()
    assert harness.outputs["again"].num_cached_tokens == 8, "its KV is sound"
    assert harness.tokens("again") == alone(again)


@BOTH
@pytest.mark.parametrize("kind", ["submit", "result"])
def test_a_broken_runner_ends_the_engine_but_everyone_is_told(is_async: bool, kind: str) -> None:
    harness = Harness(is_async=is_async, faults=dict.fromkeys(range(2, 100), kind), max_num_seqs=2)
    names = [f"r{i}" for i in range(12)]
    for name in names:
        harness.add(request(name, [1, 2, 3], seed=1, max_tokens=20, ignore_eos=True))
    while harness.engine.has_work:
        harness.step()
    with pytest.raises(EngineDeadError, match=f"3 steps in a row failed, the last with InjectedFault: {kind}"):
        harness.step()
    assert all(harness.reason(name) == "error" for name in names)
    assert "the engine has stopped" in str(harness.outputs["r11"].outputs[0].error)
    with pytest.raises(EngineDeadError):
        harness.engine.add(request("late", [1]))


def test_failures_with_successes_between_them_do_not_end_the_engine() -> None:
    harness = Harness(faults=dict.fromkeys(range(0, 100, 2), "result"), max_num_seqs=1)
    for i in range(10):
        harness.add(request(f"r{i}", [1, 2, 3], seed=1, max_tokens=5, ignore_eos=True))
    harness.run()
    assert {harness.reason(f"r{i}") for i in range(10)} == {"error"}


class InterruptedRunner(FakeRunner):
    """Ctrl-C arrives once, during `submit`."""

    def submit(self, batch: Batch) -> PendingStep:  # type: ignore[override]
        if batch.step_id == 1 and not self.events.count(("interrupt", 1)):
            self.events.append(("interrupt", 1))
            raise KeyboardInterrupt
        return super().submit(batch)


@BOTH
def test_an_interrupt_goes_through_and_the_engine_stays_usable(is_async: bool) -> None:
    harness = Harness()
    config = small_config()
    runner = InterruptedRunner(config, 16, is_async=is_async)
    harness.runner = runner
    harness.engine = Engine(runner, config, tokenizer=None, eos_token_ids=[EOS], vocab_size=40)
    harness.add(request("r", [1, 2, 3], seed=1, max_tokens=5, ignore_eos=True))
    with pytest.raises(KeyboardInterrupt):
        harness.run()
    after = request("after", [1, 2, 3], seed=1, max_tokens=5, ignore_eos=True)
    harness.add(after)
    harness.run()
    assert harness.reason("r") == "error"
    assert "KeyboardInterrupt" in str(harness.outputs["r"].outputs[0].error)
    assert harness.tokens("after") == alone(after)


def test_close() -> None:
    harness = Harness()
    harness.add(request("r", [1, 2, 3]))
    harness.engine.close()
    assert harness.runner.is_closed
    assert not harness.engine.has_work
    for call in (harness.engine.step, lambda: harness.engine.add(request("s", [1]))):
        with pytest.raises(EngineDeadError, match="closed"):
            call()
    harness.engine.abort("r")


def test_timing_and_stats() -> None:
    now = 100.0

    def clock() -> float:
        nonlocal now
        now += 1
        return now

    config = small_config(max_num_seqs=1)
    runner = FakeRunner(config, 16)
    engine = Engine(runner, config, tokenizer=None, eos_token_ids=[EOS], vocab_size=40, clock=clock)
    for name in "ab":
        engine.add(request(name, PROMPT[:5], max_tokens=2, ignore_eos=True))
    engine.step()
    assert (engine.stats.num_running, engine.stats.num_waiting, engine.stats.num_kv_blocks_used) == (1, 1, 2)
    timings = {}
    while engine.has_work:
        timings.update({d.request_id: d.timing for d in engine.step() if d.finish_reason})
    for timing in timings.values():
        assert timing.first_scheduled_time < timing.first_token_time < timing.finished_time
    assert timings["a"].finished_time < timings["b"].first_scheduled_time
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_kv_blocks) == (0, 0, 0, 16)
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_generated_tokens) == (4, 10, 4)
    assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (10, 4)


def test_timing_comes_with_the_first_token_and_with_the_last() -> None:
    harness = Harness()
    harness.add(request("r", PROMPT[:5], max_tokens=4, ignore_eos=True))
    deltas = [delta for _ in range(4) for delta in harness.step()]
    assert [delta.timing is not None for delta in deltas] == [True, False, False, True]


def test_every_request_has_its_turn() -> None:
    """A pool for two, twenty long requests, and short newcomers all the time: whoever is the oldest moves on."""
    harness = Harness(10, max_num_seqs=4)
    arrived = [f"old {i}" for i in range(20)]
    for i, name in enumerate(arrived):
        harness.add(request(name, PROMPT[: 5 + i % 9], seed=i, max_tokens=20, ignore_eos=True))
    ends: list[str] = []
    for step in range(20 * 20 + 100):  # one token a step for the oldest, and its prefills
        if step % 3 == 0:
            arrived.append(f"new {step}")
            harness.add(request(arrived[-1], PROMPT[step % 20 :][:4], seed=step, max_tokens=2, ignore_eos=True))
        for delta in harness.step():
            if delta.finish_reason is not None:
                ends.append(delta.request_id)
                earlier = arrived[: arrived.index(delta.request_id)]
                assert sum(harness.reason(name) is None for name in earlier) < 4, "it ran before someone who waits"
        if arrived[19] in ends:
            break
    assert [name for name in ends if name in arrived[:20]] == arrived[:20]
    assert harness.scheduler.num_preemptions > 0


def test_result_errors_keep_their_text() -> None:
    config = small_config()

    class Failing(FakeRunner):
        failure: Exception

        def submit(self, batch: Batch) -> PendingStep:  # type: ignore[override]
            raise self.failure

    for failure, text in ((InjectedFault(), "InjectedFault"), (RuntimeError("out of memory"), "RuntimeError: out of")):
        runner = Failing(config, 16)
        runner.failure = failure
        engine = Engine(runner, config, tokenizer=None, eos_token_ids=[EOS], vocab_size=40)
        engine.add(request("r", [1]))
        (delta,) = engine.step()
        assert text in str(delta.error)


def test_logprobs_wait_for_the_whole_prompt() -> None:
    harness = Harness(max_num_batched_tokens=4, max_num_seqs=1)
    harness.add(request("r", PROMPT[:10], seed=1, max_tokens=3, prompt_logprobs=0, ignore_eos=True))
    told: list[list[object] | None] = []
    take: Callable[[], list[object]] = harness.step  # type: ignore[assignment]
    while harness.engine.has_work:
        told += [delta.prompt_logprobs for delta in take()]  # type: ignore[attr-defined]
    assert [entries and len(entries) for entries in told] == [10, None, None]
    assert told[0] is not None
    assert told[0][0] is None
    assert [list(entry) for entry in told[0][1:]] == [[token_id] for token_id in PROMPT[1:10]]  # type: ignore[call-overload]
