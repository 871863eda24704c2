"""Intervals and tests against scipy and values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from evals import mean_and_stderr
from reports.statistics import (
    Interval,
    flips,
    holm,
    items_to_decide,
    mean_differences,
    outcome,
    resampled_differences,
    seed_spread,
)


def mean_difference(*differences):
    """One comparison of one part: an array of items per stratum."""
    return mean_differences([[[np.atleast_2d(d) for d in differences]]])[0]


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
    assert interval == Interval(0, 0, 0, 1) and interval.verdict(True) == "tie"
    with pytest.raises(ValueError, match="no items"):
        mean_difference(np.zeros(0))


def test_verdicts():
    assert Interval(1, 0.5, 2, 0.01).verdict(higher_is_better=True) == "better"
    assert Interval(1, 0.5, 2, 0.01).verdict(higher_is_better=False) == "worse"
    assert Interval(-1, -2, -0.5, 0.01).verdict(higher_is_better=False) == "better"
    assert Interval(1, -0.1, 2, 0.07).verdict(higher_is_better=True) == "tie"
    assert Interval(1, 0.5, 2, p=0.125).verdict(higher_is_better=True) == "tie"
    assert mean_difference(np.array([0.1])).verdict(True) == "tie"  # one item says nothing
    assert Interval(0, -1, 1, 1).map(np.expm1) == Interval(0, np.expm1(-1), np.expm1(1), 1)


@pytest.mark.parametrize("n", [5, 12, 50])
def test_the_p_value_is_that_of_students_test(n):
    values = np.random.default_rng(n).normal(0.3, 1, n)
    expected = stats.ttest_1samp(values, 0).pvalue
    assert mean_difference(values).p == pytest.approx(expected, rel=0.2)
    assert mean_difference(-values).p == pytest.approx(expected, rel=0.2)


def seeds_and_items(seeds, items, generator, of_both):
    """One side of three parts of variance: of seeds 0.1, of items 0.3, and of their interaction; the other is 0."""
    values = 0.5 + generator.normal(0, 0.1, (seeds, 1)) + generator.normal(0, 0.3, items)
    return [[values + generator.normal(0, of_both, (seeds, items))]]


@pytest.mark.parametrize(
    ("seeds", "items", "of_both"),
    [(2, 16, 0.1), (3, 40, 0.1), (8, 12, 0.1), (12, 100, 0.1), (5, 24, 1.0), (12, 24, 0.6)],
)
def test_with_several_seeds_the_interval_covers_the_truth(seeds, items, of_both):
    """Of items alone it would cover 62 % with three seeds and 40 items. What seeds and items do together is in what
    varies over either; where there is much of that, an interval that counts it twice covers 98 to 99.5 %."""
    generator = np.random.default_rng(0)
    found = mean_differences([seeds_and_items(seeds, items, generator, of_both) for _ in range(1000)])
    assert 0.93 <= np.mean([i.low <= 0.5 <= i.high for i in found]) <= 0.975


def test_draws_of_several_seeds_lie_as_far_apart_as_the_interval_says():
    """From three parts of variance, in two strata: the draws' variance is that of the interval, at the normal's quantile."""
    generator = np.random.default_rng(0)
    parts = [[generator.normal(0, 0.3, (3, 24)), generator.normal(0, 0.2, (3, 30))] for _ in range(2)]
    (interval,) = mean_differences([parts])
    _, (draws,) = resampled_differences([parts])
    assert (interval.high - interval.low) / (2 * 1.96 * draws.std()) == pytest.approx(1, abs=0.05)


def test_seeds_of_both_sides_are_drawn():
    generator = np.random.default_rng(0)
    items = generator.normal(0, 0.01, 100)
    steps = np.array([[-0.1], [0.0], [0.1]])
    one, both = mean_differences([[[0.3 + steps + items]], [[0.3 + steps + items], [steps + items]]])
    # Student's t of two degrees of freedom, and of about four.
    assert one.high - one.value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=0.01)
    assert both.high - both.value == pytest.approx(2.776 * 0.1 * (2 / 3) ** 0.5, rel=0.01)


def test_holms_correction_by_hand():
    # The smallest three times, the next twice, the largest once, and none below one that was smaller.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.9]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_four_outcomes():
    apart = Interval(0.005, 0.002, 0.008, 0.001)
    assert outcome(apart, 0.003, 0.01, higher_is_better=True) == "equivalent"  # though it is told apart from 0
    assert outcome(apart, 0.003, 0.001, higher_is_better=True) == "better"
    assert outcome(apart, 0.003, 0.001, higher_is_better=False) == "worse"
    assert outcome(apart, 0.06, 0.001, higher_is_better=False) == "undecided"  # after the correction
    assert outcome(Interval(0.0, -0.02, 0.02, 1.0), 1.0, 0.01, higher_is_better=False) == "undecided"
    # Told apart from 0, but whether it is beyond the margin is open.
    assert outcome(Interval(-0.01, -0.019, -0.001, 0.03), 0.03, 0.01, higher_is_better=False) == "undecided"
    assert outcome(Interval(0.02, 0.009, 0.031, 0.001), 0.001, 0.01, higher_is_better=True) == "undecided"
    assert outcome(Interval(-0.02, -0.029, -0.011, 0.001), 0.001, 0.01, higher_is_better=False) == "better"
    assert outcome(Interval(*[np.nan] * 4), np.nan, 0.01, higher_is_better=False) == "undecided"


def test_how_many_items_would_decide():
    # Half of the width has to fall to the margin: four times the items.
    assert items_to_decide(Interval(0.0, -0.02, 0.02, 1.0), 8, 0.01, 3) == pytest.approx(32)
    # An estimate of 0.004 with its end at 0.024, which has to come down by 0.014 to the margin.
    assert items_to_decide(Interval(0.004, -0.016, 0.024, 0.7), 8, 0.01, 3) == pytest.approx(8 * (20 / 6) ** 2)
    assert items_to_decide(Interval(-0.004, -0.024, 0.016, 0.7), 8, 0.01, 3) == pytest.approx(8 * (20 / 6) ** 2)
    # A z of 1.5 has to reach 2.394, that of 5 % over three measures; the margin is far away.
    interval = Interval(0.15, -0.05, 0.35, 2 * stats.norm.sf(1.5))
    assert items_to_decide(interval, 8, 0.01, 3) == pytest.approx(8 * (2.394 / 1.5) ** 2, rel=1e-3)
    # Told apart from 0, and a lower end of 0.005 that has to come up to the margin; to its own value it never comes.
    assert items_to_decide(Interval(0.03, 0.005, 0.05, 1e-4), 8, 0.01, 3) == pytest.approx(8 * (25 / 20) ** 2)
    assert items_to_decide(Interval(-0.03, -0.05, -0.005, 1e-4), 8, 0.01, 3) == pytest.approx(8 * (25 / 20) ** 2)
    assert items_to_decide(Interval(0.01, 0.005, 0.015, 1e-4), 8, 0.01, 3) == np.inf
    assert items_to_decide(Interval(0.03, 0.005, 0.05, 0.0), 8, 0.01, 3) == pytest.approx(8 * (25 / 20) ** 2)
    assert items_to_decide(Interval(np.inf, 0.5, np.inf, 0.2), 8, 0.01, 3) == np.inf
    assert items_to_decide(Interval(0.1, -np.inf, np.inf, 1.0), 1, 0.01, 3) == np.inf


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
