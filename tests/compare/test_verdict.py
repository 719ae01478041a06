"""Ratios, their intervals, and what is said about them."""

import random

import pytest

from nybble.compare.verdict import Ratio, crossing_words, crossings, inverse, ratio_of, speed_words


def test_the_ratio_is_of_geometric_means() -> None:
    ratio = ratio_of([2.0, 8.0], [1.0, 4.0], is_paired=True)
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)
    assert (ratio.low, ratio.high) == (pytest.approx(2.0), pytest.approx(2.0))  # pairs agree, whatever they share


def test_one_repeat_has_no_interval_and_zero_no_ratio() -> None:
    assert ratio_of([3.0], [2.0], is_paired=True) == Ratio(pytest.approx(1.5), None, None)
    assert ratio_of([3.0], [2.0, 2.1], is_paired=False) == Ratio(pytest.approx(1.4639, rel=1e-3), None, None)
    assert ratio_of([0.0], [2.0], is_paired=True) is None
    assert ratio_of([], [2.0], is_paired=True) is None


@pytest.mark.parametrize("is_paired", [True, False])
def test_intervals_hold_the_truth_as_often_as_they_say(is_paired: bool) -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        shared = [draw.lognormvariate(0, 0.2) if is_paired else 1.0 for _ in range(4)]
        ours = [1.3 * common * draw.lognormvariate(0, 0.05) for common in shared]
        base = [common * draw.lognormvariate(0, 0.05) for common in shared]
        ratio = ratio_of(ours, base, is_paired=is_paired)
        assert ratio is not None
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.3 <= ratio.high
    assert 925 <= held <= 985


def test_crossings_are_between_points_on_a_logarithmic_scale() -> None:
    assert crossings([1, 4, 16], [1.0, 1.2, 1.0], 1.1) == pytest.approx([2.0, 8.0])
    assert crossings([1, 2], [1.0, 1.05], 1.1) == []


def test_words() -> None:
    rising = [Ratio(1.0, 0.9, 1.05), Ratio(1.2, 1.05, 1.3)]
    assert crossing_words([1, 4], rising, 1.1, "streams") == (
        "the ratio crosses 1.1 at about 2 streams (1 of 2 points may lie on either side)"
    )
    assert "stays below 1.6" in crossing_words([1, 4], rising, 1.6, "streams")
    assert "above 0.5" in crossing_words([1, 4], rising, 0.5, "streams")
    assert "no difference is shown" in speed_words("a", "b", Ratio(1.1, 0.9, 1.3))
    assert "a is 1.20 times as fast as b" in speed_words("a", "b", Ratio(1.2, 1.1, 1.3))
    assert "a is slower: 0.80" in speed_words("a", "b", Ratio(0.8, 0.7, 0.9))
    assert "uncertainty not known" in speed_words("a", "b", Ratio(0.8, None, None))
    assert "cannot be compared" in speed_words("a", "b", None)
    assert inverse(Ratio(2.0, 1.0, 4.0)) == Ratio(0.5, 0.25, 1.0)
    assert inverse(Ratio(2.0, None, None)) == Ratio(0.5, None, None)
