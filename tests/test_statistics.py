"""Intervals and tests against scipy and values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from evals.core.statistics import Interval, flips, mean_difference, seed_spread


@pytest.mark.parametrize("discrete", [True, False])
def test_the_interval_is_scipys_percentile_bootstrap(discrete):
    generator = np.random.default_rng(1)
    values = (
        generator.choice([-1.0, 0.0, 1.0], size=300, p=[0.1, 0.7, 0.2]) if discrete else generator.normal(0.3, 1, 40)
    )
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
    expected = 1.96 * np.sqrt(0.25 / 1000 + 0.25 / 20) / 2
    assert interval.high - interval.low == pytest.approx(2 * expected, rel=0.05)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        interval = mean_difference(generator.normal(0.5, 1, 50))
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


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
    assert Interval(0, -1, 1).map(np.exp) == Interval(1, np.exp(-1), np.exp(1))


def test_mcnemar():
    before = np.array([1] * 10 + [0] * 10, bool)
    after = np.array([0] * 9 + [1] + [1] + [0] * 9, bool)
    result = flips(before, after)
    assert (result.worse, result.better, result.n) == (9, 1, 20)
    assert result.p == pytest.approx(2 * (1 + 10) / 2**10)  # ten coins, one or fewer heads, both sides
    assert flips(before, before).p == 1.0


def test_spread_over_seeds():
    assert seed_spread(np.array([1.0, 2.0, 3.0])) == (2.0, 1.0)
    assert seed_spread(np.array([4.0])) == (4.0, None)
