"""Sequences with a grammar, on a runner whose tokens expose every mistake: who waits, who does not, what is kept."""

from concurrent.futures import Future
from typing import Any

import pytest
from support.engine_harness import Harness, alone, request
from support.fake_runner import EOS, VOCAB_SIZE

from nybble.core.batch import DEVICE_TOKEN
from nybble.core.errors import RequestError
from nybble.core.structured import StructuredOutputs

FORM = StructuredOutputs(regex="any")


class CountingMatcher:
    """Any tokens, at most so many of them. Its mask names how many it has seen."""

    def __init__(self, most: int, fails_at: int | None = None) -> None:
        self.seen: list[int] = []
        self._most = most
        self._fails_at = fails_at

    @property
    def mask(self) -> bytes:
        return len(self.seen).to_bytes(4, "little")

    @property
    def is_finished(self) -> bool:
        return len(self.seen) == self._most

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)
        if len(self.seen) == self._fails_at:
            raise ValueError("it takes too long")


class FakeGrammars:
    def __init__(self, most: int = 5, fails_at: int | None = None) -> None:
        self.most, self.fails_at = most, fails_at
        self.future: Future[Any] = Future()
        self.matchers: list[CountingMatcher] = []
        self.is_closed = False

    def compile(self, form: StructuredOutputs) -> Future[Any]:
        return self.future

    def open(self, reasoning: str | None) -> CountingMatcher:
        self.matchers.append(CountingMatcher(self.most, self.fails_at))
        return self.matchers[-1]

    def close(self) -> None:
        self.is_closed = True


def harness(grammars: FakeGrammars, *, is_ready: bool = True, **options: Any) -> Harness:
    made = Harness(**options)
    made.engine._grammars._source = grammars
    if is_ready:
        grammars.future.set_result(grammars)
    return made


@pytest.mark.parametrize("is_async", [False, True])
def test_each_token_is_chosen_under_its_own_mask(is_async: bool) -> None:
    grammars = FakeGrammars(most=5)
    h = harness(grammars, is_async=is_async)
    h.add(request("form", [1, 2, 3], seed=1, max_tokens=20, ignore_eos=True, structured_outputs=FORM))
    h.add(request("free", [4, 5], seed=2, max_tokens=12, ignore_eos=True))
    h.run()
    assert h.tokens("form") == alone(request("form", [1, 2, 3], seed=1, max_tokens=5, ignore_eos=True))
    assert h.tokens("free") == alone(request("free", [4, 5], seed=2, max_tokens=12, ignore_eos=True))
    assert h.reason("form") == "stop"
    assert grammars.matchers[0].seen == h.tokens("form")
    masked = [row for batch in h.runner.batches for row in batch.rows if row.mask is not None]
    assert [int.from_bytes(row.mask or b"", "little") for row in masked] == [0, 1, 2, 3, 4]
    assert all(DEVICE_TOKEN not in row.token_ids for row in masked)


def test_neighbours_do_not_wait() -> None:
    """While a step with a form's row is in flight, the next one has all rows but that."""
    h = harness(FakeGrammars(most=8), is_async=True)
    h.add(request("form", [1], seed=1, max_tokens=8, ignore_eos=True, structured_outputs=FORM))
    h.add(request("free", [4], seed=2, max_tokens=16, ignore_eos=True))
    h.run()
    free_rows = [any(row.slot == 1 for row in batch.rows) for batch in h.runner.batches]
    assert sum(free_rows) == 16
    assert free_rows[:16] == [True] * 16, "the free one runs in every step"


def test_a_prompt_in_chunks_is_masked_at_its_end_only() -> None:
    grammars = FakeGrammars(most=2)
    h = harness(grammars, max_num_batched_tokens=4)
    h.add(request("form", list(range(1, 11)), seed=1, max_tokens=4, structured_outputs=FORM, ignore_eos=True))
    h.run()
    masks = [batch.rows[0].mask for batch in h.runner.batches]
    assert masks == [None, None, b"\0\0\0\0", b"\1\0\0\0"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_preempted_form_goes_on_where_it_was(is_async: bool) -> None:
    grammars = FakeGrammars(most=30)
    h = harness(grammars, num_blocks=10, is_async=is_async)
    for name in "abc":
        h.add(request(name, [1, 2, 3], seed=ord(name), max_tokens=30, ignore_eos=True, structured_outputs=FORM))
    h.run(5000)
    assert h.engine.stats.num_preemptions > 0
    for name, matcher in zip("abc", grammars.matchers, strict=True):
        tokens = alone(request(name, [1, 2, 3], seed=ord(name), max_tokens=30, ignore_eos=True))
        assert h.tokens(name) == matcher.seen == tokens


def test_completions_have_places_of_their_own() -> None:
    grammars = FakeGrammars(most=6)
    h = harness(grammars, is_async=True)
    h.add(request("form", [1, 2], n=3, seed=1, max_tokens=10, ignore_eos=True, structured_outputs=FORM))
    h.run()
    assert [matcher.seen for matcher in grammars.matchers] == [h.tokens("form", index) for index in range(3)]
    assert len({tuple(matcher.seen) for matcher in grammars.matchers}) == 3


def test_the_end_token_ends_it_before_the_grammar_does() -> None:
    grammars = FakeGrammars(most=60)
    h = harness(grammars)
    asked = next(
        r
        for seed in range(100)
        if EOS in alone(r := request("form", [1, 2], seed=seed, max_tokens=40, structured_outputs=FORM))
    )
    h.add(asked)
    h.run()
    assert h.tokens("form")[-1] == EOS
    assert h.reason("form") == "stop"


def test_others_run_while_a_grammar_is_compiled() -> None:
    grammars = FakeGrammars()
    h = harness(grammars, is_ready=False)
    h.add(request("form", [1, 2, 3], seed=1, max_tokens=5, structured_outputs=FORM, ignore_eos=True))
    h.add(request("free", [4, 5], seed=2, max_tokens=5, ignore_eos=True))
    for _ in range(6):
        h.step()
    assert h.reason("free") == "length"
    assert (h.engine.stats.num_waiting, h.engine.stats.num_running) == (1, 0)
    assert h.step() == [], "with nothing else to do it waits for a moment"
    grammars.future.set_result(grammars)
    h.run()
    assert len(h.tokens("form")) == 5
    assert h.engine.stats.num_waiting == 0


@pytest.mark.parametrize("n", [1, 2])
def test_a_refused_grammar_touches_no_one_else(n: int) -> None:
    grammars = FakeGrammars()
    h = harness(grammars, is_ready=False)
    form = StructuredOutputs(regex="bad", source="response_format")
    h.add(request("form", [1, 2, 3], n=n, seed=1, max_tokens=5, structured_outputs=form))
    h.add(request("free", [4, 5], seed=2, max_tokens=5, ignore_eos=True))
    h.step()
    grammars.future.set_exception(RequestError("it is bad"))
    deltas = [delta for delta in h.step() if delta.request_id == "form"]
    assert [(delta.finish_reason, delta.refused_parameter) for delta in deltas] == [("error", "response_format")] * n
    assert deltas[0].error == "response_format: it is bad"
    h.run()
    assert h.tokens("free") == alone(request("free", [4, 5], seed=2, max_tokens=5, ignore_eos=True))


def test_a_grammar_that_cannot_be_opened_is_refused() -> None:
    grammars = FakeGrammars()
    h = harness(grammars, is_ready=False)
    grammars.future.set_result(None)
    h.add(request("form", [1, 2, 3], seed=1, max_tokens=5, structured_outputs=FORM))
    (delta,) = h.step()
    assert (delta.finish_reason, delta.refused_parameter) == ("error", "structured_outputs")
    h.run()


def test_an_abort_ends_the_waiting() -> None:
    grammars = FakeGrammars()
    h = harness(grammars, is_ready=False)
    h.add(request("form", [1, 2, 3], n=2, seed=1, max_tokens=5, structured_outputs=FORM))
    h.step()
    h.engine.abort("form")
    assert [delta.finish_reason for delta in h.step()] == ["abort", "abort"]
    assert not h.engine.has_work
    grammars.future.set_result(grammars)
    h.run()
    assert not grammars.matchers
    h.add(request("again", [1, 2, 3], seed=1, max_tokens=3, structured_outputs=FORM, ignore_eos=True))
    h.run()
    assert h.tokens("again")
    assert h.engine._grammars.num_sequences == 0


def test_a_matcher_that_fails_ends_its_sequence_only() -> None:
    h = harness(FakeGrammars(fails_at=3), is_async=True)
    h.add(request("form", [1, 2, 3], seed=1, max_tokens=20, ignore_eos=True, structured_outputs=FORM))
    h.add(request("free", [4, 5], seed=2, max_tokens=12, ignore_eos=True))
    h.run()
    output = h.outputs["form"].outputs[0]
    assert (output.finish_reason, output.error) == ("error", "it takes too long")
    assert h.tokens("free") == alone(request("free", [4, 5], seed=2, max_tokens=12, ignore_eos=True))


def test_a_step_that_fails_leaves_forms_sound() -> None:
    grammars = FakeGrammars(most=12)
    h = harness(grammars, is_async=True, faults={3: "result"})
    h.add(request("a", [1, 2, 3], seed=1, max_tokens=20, ignore_eos=True, structured_outputs=FORM))
    h.add(request("b", [4, 5], seed=2, max_tokens=12, ignore_eos=True))
    for _ in range(3):
        h.step()
    h.add(request("c", [6], seed=3, max_tokens=20, ignore_eos=True, structured_outputs=FORM))
    h.run()
    assert "error" in {h.reason(name) for name in "abc"}
    for name, matcher in zip("ac", grammars.matchers, strict=True):
        if h.reason(name) != "error":
            assert h.tokens(name) == matcher.seen
            assert len(matcher.seen) == 12


def test_without_a_compiler_forms_are_refused() -> None:
    h = Harness()
    with pytest.raises(RequestError, match="response_format needs a tokenizer") as caught:
        h.add(request("a", [1], structured_outputs=StructuredOutputs(regex="a", source="response_format")))
    assert caught.value.parameter == "response_format"
    assert not h.engine.has_work


def test_closing_the_engine_closes_the_compiler() -> None:
    grammars = FakeGrammars()
    h = harness(grammars, is_ready=False)
    h.add(request("form", [VOCAB_SIZE - 1], structured_outputs=FORM))
    h.engine.close()
    assert grammars.is_closed
