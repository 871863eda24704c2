"""Intervals and tests against scipy and values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from evals.core.statistics import Interval, flips, mean_and_stderr, mean_difference, seed_spread


@pytest.mark.parametrize("discrete", [True, False])
def test_the_interval_is_scipys_percentile_bootstrap(discrete):
    generator = np.random.default_rng(1)
    # So many items that Student's t is the normal, and plain percentiles are what they should be.
    choices = generator.choice([-1.0, 0.0, 1.0], size=600, p=[0.1, 0.7, 0.2])
    values = choices if discrete else generator.normal(0.3, 1, 600)
    mine = mean_difference(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=2).confidence_interval
    assert mine.value == pytest.approx(values.mean())
    width = theirs.high - theirs.low
    assert mine.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert mine.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_strata_count_alike_whatever_their_size():
    large, small = np.tile([0.0, 1.0], 500), np.tile([0.0, -1.0], 10)
    interval = mean_difference(large, small)
    assert interval.value == pytest.approx(0.0)
    # The standard error of the mean of two means, of which the small stratum has nearly all.
    expected = stats.t.isf(0.025, 19) * np.sqrt(0.25 / 1000 + 0.25 / 19) / 2
    assert interval.high - interval.low == pytest.approx(2 * expected, rel=0.05)


@pytest.mark.parametrize("n", [3, 4, 6, 12, 50])
def test_the_interval_covers_the_truth_as_often_as_it_says(n):
    """Plain percentiles cover 87 % with 6 items and 91 % with 12."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        interval = mean_difference(generator.normal(0.5, 1, n))
        covered += interval.low <= 0.5 <= interval.high
    assert 0.93 <= covered / 1000 <= 0.975


def test_equal_systems_tie():
    interval = mean_difference(np.zeros(20))
    assert interval == Interval(0, 0, 0) and interval.verdict(True) == "tie"
    with pytest.raises(ValueError, match="no items"):
        mean_difference(np.zeros(0))


def test_verdicts():
    assert Interval(1, 0.5, 2).verdict(higher_is_better=True) == "better"
    assert Interval(1, 0.5, 2).verdict(higher_is_better=False) == "worse"
    assert Interval(-1, -2, -0.5).verdict(higher_is_better=False) == "better"
    assert Interval(1, -0.1, 2).verdict(higher_is_better=True) == "tie"
    assert Interval(1, 0.5, 2, p=0.125).verdict(higher_is_better=True) == "tie"
    assert Interval(1, 0.5, 2, p=0.03).verdict(higher_is_better=True) == "better"
    assert mean_difference(np.array([0.1])).verdict(True) == "tie"  # one item says nothing
    assert Interval(0, -1, 1).map(np.exp) == Interval(1, np.exp(-1), np.exp(1))


def test_mcnemar():
    before = np.array([1] * 10 + [0] * 10, bool)
    after = np.array([0] * 9 + [1] + [1] + [0] * 9, bool)
    result = flips(before, after)
    assert (result.worse, result.better, result.n) == (9, 1, 20)
    assert result.p == pytest.approx(2 * (1 + 10) / 2**10)  # ten coins, one or fewer heads, both sides
    assert flips(before, before).p == 1.0


def test_mean_and_standard_error():
    assert mean_and_stderr(np.array([1.0, 2.0, 3.0])) == (2.0, pytest.approx(1 / 3**0.5))
    assert mean_and_stderr(np.array([4.0])) == (4.0, None)


def test_spread_over_seeds():
    assert seed_spread(np.array([1.0, 2.0, 3.0])) == (2.0, 1.0)
    assert seed_spread(np.array([4.0])) == (4.0, None)
