"""Arrival times, by statistics. Seeds are fixed: the tests are deterministic."""

import math

import numpy as np
import pytest

from nybble.bench.arrivals import arrival_times

COUNT = 20_000


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_poisson_gaps_are_exponential(rate: float) -> None:
    gaps = np.sort(np.diff(arrival_times(rate, COUNT, seed=1)))
    expected = 1 - np.exp(-rate * gaps)
    steps = np.arange(1, len(gaps) + 1) / len(gaps)
    distance = np.abs(steps - expected).max()
    assert distance < 1.63 / math.sqrt(len(gaps))  # Kolmogorov–Smirnov at 1 %
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)


def test_poisson_counts_vary_as_much_as_their_mean_and_gaps_do_not_correlate() -> None:
    times = np.array(arrival_times(10.0, COUNT, seed=2))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.08)
    gaps = np.diff(times)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("shape", [0.25, 4.0])
def test_burstiness_is_the_gammas_shape(shape: float) -> None:
    gaps = np.diff(arrival_times(5.0, COUNT, burstiness=shape, seed=3))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(shape), rel=0.05)


def test_regular_and_all_at_once() -> None:
    assert arrival_times(4.0, 4, burstiness=math.inf) == [0.0, 0.25, 0.5, 0.75]
    assert arrival_times(math.inf, 3) == [0.0, 0.0, 0.0]


def test_a_ramp_changes_the_rate() -> None:
    gaps = np.diff(arrival_times(10.0, COUNT, end_rate=30.0, seed=4))
    assert 1 / gaps[:2000].mean() == pytest.approx(11, rel=0.08)
    assert 1 / gaps[-2000:].mean() == pytest.approx(29, rel=0.08)


def test_seeds() -> None:
    assert arrival_times(3.0, 50, seed=1) == arrival_times(3.0, 50, seed=1) != arrival_times(3.0, 50, seed=2)
