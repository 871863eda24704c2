"""How sure a number is: paired bootstrap intervals, McNemar's exact test, spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEW = 8  # items below which the bootstrap's interval misses the truth in more than 6 % of cases (12 % with 4)


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
    too narrow for a dozen items, by the factor that Student's t has over the normal. With fewer than FEW items in an array it
    is Student's own, since no resample can reach beyond the items that there are; with a single one it is unbounded.
    ValueError for an array without items.
    """
    return mean_differences([differences])[0]


def mean_differences(comparisons: Sequence[Sequence[np.ndarray]]) -> list[Interval]:
    """`mean_difference` of each of many comparisons, which a report has thousands of.

    Those with as many items share the draws: a matrix of how often each item is drawn, so that the resampled means of all
    comparisons are one product with it.
    """
    if any(len(d) == 0 for differences in comparisons for d in differences):
        raise ValueError("no items to compare")
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, differences in enumerate(comparisons):
        shapes.setdefault(tuple(len(d) for d in differences), []).append(i)
    found: dict[int, Interval] = {}
    for lengths, places in shapes.items():
        strata = [np.stack([comparisons[i][k] for i in places], axis=1).astype(float) for k in range(len(lengths))]
        values = np.mean([stratum.mean(axis=0) for stratum in strata], axis=0)
        n = min(lengths)
        if n < 2:
            found |= {i: Interval(float(value), -np.inf, np.inf) for i, value in zip(places, values, strict=True)}
            continue
        t = stats.t.isf((1 - CONFIDENCE) / 2, n - 1)
        if n < FEW:
            error = np.sqrt(sum(stratum.var(axis=0, ddof=1) / len(stratum) for stratum in strata)) / len(strata)
            low, high = values - t * error, values + t * error
        else:
            means = sum(_resampled_means(stratum, k) for k, stratum in enumerate(strata)) / len(strata)
            tail = stats.norm.sf(np.sqrt(n / (n - 1)) * t)
            low, high = np.quantile(means, [tail, 1 - tail], axis=1)
        low, high = np.round(low, 12), np.round(high, 12)  # so that a bound of zero is zero
        found |= {i: Interval(*map(float, row)) for i, *row in zip(places, values, low, high, strict=True)}
    return [found[i] for i in range(len(comparisons))]


def _resampled_means(values: np.ndarray, stratum: int) -> np.ndarray:
    """Means of RESAMPLES samples of the rows of (items, comparisons), drawn with replacement: (comparisons, RESAMPLES).

    Draws depend on the number of items and of the stratum alone, so the same comparison has the same interval everywhere.
    """
    n = len(values)
    generator = np.random.default_rng(stratum)
    rows = max(1, 2**22 // n)  # of the matrix at a time: 32 MB
    parts = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn = generator.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        parts.append(values.T @ counts.T.astype(float) / n)
    return np.concatenate(parts, axis=1)


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
    # Under the null hypothesis a changed question is as likely to have changed either way (McNemar, exact): twice a tail
    # of the binomial distribution, which is symmetric.
    p = min(1.0, 2 * special.bdtr(min(worse, better), worse + better, 0.5))
    return Flips(worse, better, len(before), float(p))


def seed_spread(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; None for the deviation of a single one."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
