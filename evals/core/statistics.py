"""How sure a number is: paired bootstrap intervals, McNemar's exact test, spread over seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float
    p: float | None = None  # of an exact test of the same difference, where there is one

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of what was estimated."""
        return Interval(function(self.value), function(self.low), function(self.high), self.p)

    def verdict(self, higher_is_better: bool) -> str:
        """ "better" or "worse", for an interval of a difference; "tie" if it holds 0 or the exact test does not reject."""
        if self.low <= 0 <= self.high or (self.p is not None and self.p >= 1 - CONFIDENCE):
            return "tie"
        return "better" if (self.low > 0) == higher_is_better else "worse"


def mean_difference(*differences: np.ndarray) -> Interval:
    """Bootstrap interval of the mean of paired differences, one array per stratum, e.g. task.

    Each array is per item: what one system has minus what the other has on the same item. Items are drawn with replacement
    within their array, and the value is the mean over the arrays of their means, as in an average over tasks. The interval is
    the expanded percentile one (Hesterberg, What Teachers Should Know About the Bootstrap, 2015): plain percentiles are
    too narrow for a dozen items, by the factor that Student's t has over the normal. With an array of a single item it is
    unbounded. ValueError for an array without items.
    """
    if any(len(d) == 0 for d in differences):
        raise ValueError("no items to compare")
    generator = np.random.default_rng(0)
    value = float(np.mean([np.mean(d) for d in differences]))
    n = min(len(d) for d in differences)
    if n < 2:
        return Interval(value, -np.inf, np.inf)
    means = np.mean([_resampled_means(np.asarray(d, float), generator) for d in differences], axis=0)
    tail = stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.isf((1 - CONFIDENCE) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of RESAMPLES samples drawn with replacement.

    How often each distinct value is drawn is multinomial: for differences of right and wrong, with three values, a hundred
    times faster than scipy.stats.bootstrap's draws of every item, which a report of hundreds of cells would wait minutes for.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
    return draws @ distinct / len(values)


def mean_and_stderr(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of independent items and its standard error; None for the error of a single one."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


@dataclass(frozen=True)
class Flips:
    """Questions whose answer changed between right and wrong, and how likely so uneven a change is by chance."""

    worse: int  # right -> wrong
    better: int  # wrong -> right
    n: int
    p: float  # McNemar's exact test, two-sided


def flips(before: np.ndarray, after: np.ndarray) -> Flips:
    """Compare which questions two systems answered right, bool (questions,) each."""
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    worse, better = int((before & ~after).sum()), int((~before & after).sum())
    # Under the null hypothesis a changed question is as likely to have changed either way (McNemar, exact).
    p = stats.binomtest(worse, worse + better, 0.5).pvalue if worse + better else 1.0
    return Flips(worse, better, len(before), float(p))


def seed_spread(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; None for the deviation of a single one."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
