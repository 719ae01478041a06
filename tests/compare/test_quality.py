"""The quality gate on answers made by hand."""

import pytest

from nybble.compare.quality import Answer, agreement, judge

BASE = [Answer(["a", "b", "c", "d"], [-1.0, -1.0, -1.0, -1.0]), Answer(["x", "y"], [-2.0, -2.0])]


def test_agreement_ends_at_the_first_difference() -> None:
    ours = [Answer(["a", "b", "z", "d"], [-1.1, -0.9, -5.0, -1.0]), BASE[1]]
    found = agreement(ours, BASE)
    assert (found.num_prompts, found.num_identical) == (2, 1)
    assert found.share == pytest.approx(4 / 6)
    assert found.distance == pytest.approx((0.1 + 0.1 + 0 + 0) / 4)
    assert found.is_passed


def test_other_answers_fail_and_so_do_other_probabilities() -> None:
    other = [Answer(["q", "b", "c", "d"], [-1.0] * 4), Answer(["q", "y"], [-2.0] * 2)]
    assert not agreement(other, BASE).is_passed
    flat = [Answer(answer.tokens, [value - 1 for value in answer.logprobs]) for answer in BASE]
    assert not agreement(flat, BASE).is_passed
    longer = [Answer([*answer.tokens, "more"] * 4, [*answer.logprobs, -1.0] * 4) for answer in BASE]
    assert not agreement(longer, BASE).is_passed


def test_what_is_not_known_is_said() -> None:
    assert judge({"a": BASE, "b": "no log-probabilities"}, "a")["b"] == "no log-probabilities"
    assert "baseline has no answers" in judge({"a": "no route", "b": BASE}, "a")["b"]
    assert judge({"a": BASE, "b": BASE}, "a")["b"]["num_identical"] == 2
