"""How sure a number is: paired bootstrap intervals, what they decide, McNemar's exact test, spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEW = 8  # items below which the bootstrap's interval misses the truth in more than 6 % of cases (12 % with 4)
ZERO = 1e-12  # a difference of numbers near 1 that is only rounding


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, and the two-sided p-value of there being nothing to estimate."""

    value: float
    low: float
    high: float
    p: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function, of which 0 is 0, of what was estimated."""
        return Interval(function(self.value), function(self.low), function(self.high), self.p)

    def verdict(self, higher_is_better: bool) -> str:
        """ "better" or "worse", for an interval of a difference; "tie" if it holds 0 or the test does not reject."""
        if self.low <= 0 <= self.high or self.p >= 1 - CONFIDENCE:
            return "tie"
        return "better" if (self.low > 0) == higher_is_better else "worse"


def outcome(interval: Interval, p: float, margin: float, higher_is_better: bool) -> str:
    """ "better", "worse", "equivalent" or "undecided"; `p` is the interval's own after the correction for several measures.

    Equivalent is what lies within the margin with all of its interval, be it told apart from 0 or not. Better and worse is
    what is told apart from 0 and lies beyond the margin with all of it. An interval that holds both decides nothing, nor does
    one that is not a number.
    """
    if -margin <= interval.low and interval.high <= margin:
        return "equivalent"
    beyond = interval.low > margin or interval.high < -margin
    if p >= 1 - CONFIDENCE or not beyond:
        return "undecided"
    return "better" if (interval.value > 0) == higher_is_better else "worse"


def items_to_decide(interval: Interval, n: int, margin: float, measures: int) -> float:
    """About how many items would decide what `n` do not, if the estimate stayed and its error fell with their square root.

    An estimate within the margin is decided by an interval within it, one beyond by an interval beyond that is told apart
    from 0 at the strictest level of Holm's correction over so many measures. Infinite if no number will do, or is known.
    """
    if not np.isfinite([interval.low, interval.high]).all():
        return np.inf
    value, z = abs(interval.value), stats.norm.isf(interval.p / 2)
    apart = (stats.norm.isf((1 - CONFIDENCE) / 2 / measures) / z) ** 2 if z > 0 else np.inf
    above, below = interval.high - interval.value, interval.value - interval.low  # it may reach further to one side
    towards, away = (below, above) if interval.value > 0 else (above, below)
    if value < margin:
        return n * max(away / (margin - value), towards / (margin + value)) ** 2
    return n * max(apart, (towards / (value - margin)) ** 2) if value > margin else np.inf


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): rejecting those below 5 % errs in any of them in 5 % of cases."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected.tolist()


# What goes into a comparison: for each stratum, e.g. task, an array of (seeds, items) whose mean is added to the others'.
Part = Sequence[np.ndarray]


def mean_differences(comparisons: Sequence[Sequence[Part]]) -> list[Interval]:
    """Bootstrap interval of each of many paired comparisons.

    A comparison is a sum of parts, with the same items: what one system has on each, and less what the other has. What has
    the same seeds, or a single one, is summed before. The value is the mean over strata of the means over items, as in an
    average over tasks. Items are drawn with replacement within their stratum, and the seeds of each part likewise, since with
    another seed a training ends elsewhere.

    The interval is the expanded percentile one (Hesterberg, What Teachers Should Know About the Bootstrap, 2015): plain
    percentiles are too narrow for a dozen items or three seeds, by the factor that Student's t has over the normal. The
    degrees of freedom are one less than the items of the smallest stratum, with several seeds Satterthwaite's of the
    variances over items and over seeds. With fewer than FEW - 1 the interval is Student's own, since no resample can reach
    beyond the items and seeds that there are; with a single item it is unbounded. Each p-value is one minus the confidence
    at which the interval would end at 0. ValueError for a stratum without items.

    Comparisons with as many items share the draws: a matrix of how often each item is drawn, so that the resampled means of
    all are one product with it.
    """
    if any(stratum.shape[1] == 0 for parts in comparisons for part in parts for stratum in part):
        raise ValueError("no items to compare")
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, parts in enumerate(comparisons):
        shapes.setdefault(tuple(stratum.shape[1] for stratum in parts[0]), []).append(i)
    found: dict[int, Interval] = {}
    for lengths, places in shapes.items():
        found |= zip(places, _intervals([comparisons[i] for i in places], lengths), strict=True)
    return [found[i] for i in range(len(comparisons))]


def _intervals(comparisons: Sequence[Sequence[Part]], lengths: tuple[int, ...]) -> list[Interval]:
    """Of comparisons whose strata have so many items."""
    n, strata = min(lengths), range(len(lengths))
    values, variance, freedom, expansion = _spread(comparisons, lengths)
    if n < 2:
        return [Interval(float(value), -np.inf, np.inf, 1.0) for value in values]
    t = stats.t.isf((1 - CONFIDENCE) / 2, freedom)
    error = np.sqrt(variance)
    low, high = values - t * error, values + t * error
    statistic = np.divide(abs(values), error, out=np.where(abs(values) > ZERO, np.inf, 0.0), where=error > 0)
    enough = np.flatnonzero(freedom >= FEW - 1)
    if len(enough):
        means = _resampled([comparisons[i] for i in enough], strata)
        tails = stats.norm.sf(expansion[enough] * t[enough])
        bounds = [np.quantile(row, [tail, 1 - tail]) for row, tail in zip(means, tails, strict=True)]
        low[enough], high[enough] = np.transpose(bounds)
        beyond = np.mean(np.sign(values[enough])[:, None] * means <= ZERO, axis=1)
        statistic[enough] = stats.norm.isf(np.maximum(beyond, 1 / RESAMPLES)) / expansion[enough]
    p = np.minimum(1, 2 * stats.t.sf(statistic, freedom))
    low, high = np.round(low, 12), np.round(high, 12)  # so that a bound of zero is zero
    return [Interval(*map(float, row)) for row in zip(values, low, high, p, strict=True)]


def _spread(comparisons: Sequence[Sequence[Part]], lengths: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Of comparisons whose strata have so many items: the values, their variances over items and seeds, the degrees of
    freedom of these, and how many times wider than that of resampled values an interval has to be. With one item the last
    three say nothing."""
    n, strata = min(lengths), range(len(lengths))
    differences = [
        np.stack([sum(part[k].mean(axis=0) for part in parts) for parts in comparisons], axis=1) for k in strata
    ]
    values = np.mean([d.mean(axis=0) for d in differences], axis=0)
    if n < 2:
        return values, np.full(len(values), np.inf), np.ones(len(values)), np.ones(len(values))
    over_items = sum(d.var(axis=0, ddof=1) / len(d) for d in differences) / len(lengths) ** 2
    variance, resampled, squares = over_items.copy(), over_items * (n - 1) / n, over_items**2 / (n - 1)
    freedom, expansion = np.full(len(values), n - 1.0), np.full(len(values), np.sqrt(n / (n - 1)))
    for i, parts in enumerate(comparisons):
        several = [part for part in parts if len(part[0]) > 1]
        if not several:
            continue
        by_seeds, by_both, least = 0.0, 0.0, n - 1
        for part in several:
            means = np.mean([stratum.mean(axis=1) for stratum in part], axis=0)
            r, over_seeds = len(means), means.var(ddof=1) / len(means)
            over_both = [_interaction(stratum) / len(part) ** 2 for stratum in part]
            by_seeds, by_both, least = by_seeds + over_seeds, by_both + sum(over_both), min(least, r - 1)
            squares[i] += over_seeds**2 / (r - 1) + sum(over_both) ** 2 / ((r - 1) * (n - 1))
            # The variance of resampled means falls short by this factor, but has what seeds and items do together once more.
            inner = sum(v * (1 - 1 / r) * (1 - 1 / k) for v, k in zip(over_both, lengths, strict=True))
            resampled[i] += over_seeds * (r - 1) / r + inner
        # What seeds and items do together is in the variance over either; it counts once.
        variance[i] = max(over_items[i] + by_seeds - by_both, over_items[i], by_seeds)
        freedom[i] = max(variance[i] ** 2 / squares[i], least) if squares[i] else n - 1
        expansion[i] = np.sqrt(variance[i] / resampled[i]) if resampled[i] else 1
    return values, variance, freedom, expansion


def _interaction(values: np.ndarray) -> float:
    """Of values (seeds, items): what seeds and items do together adds to the variance of their mean, without bias."""
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float(rest.var() / np.prod(np.subtract(values.shape, 1)))


def resampled_differences(comparisons: Sequence[Sequence[Part]]) -> tuple[np.ndarray, np.ndarray]:
    """Values (comparisons,) of comparisons on the same items, and RESAMPLES draws of each, (comparisons, RESAMPLES).

    A draw takes the same items in all comparisons, and the same seeds where these have the same sets of seeds, so functions
    of several differences can be told from it: their percentiles are an interval. The draws lie as far from the value as the
    interval of `mean_differences` does, which is further than plain resamples of few items or seeds. ValueError for fewer
    than two items.
    """
    lengths = tuple(stratum.shape[1] for stratum in comparisons[0][0])
    if min(lengths) < 2:
        raise ValueError(f"{min(lengths)} items cannot be drawn from")
    values, _, freedom, expansion = _spread(comparisons, lengths)
    wider = expansion * stats.t.isf((1 - CONFIDENCE) / 2, freedom) / stats.norm.isf((1 - CONFIDENCE) / 2)
    means = _resampled(comparisons, range(len(lengths)))
    return values, values[:, None] + wider[:, None] * (means - values[:, None])


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval, which may be infinite."""

    value: float
    low: float
    high: float


def percentiles(value: float, draws: np.ndarray) -> Estimate:
    """A value with the ends of the interval of its draws."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    return Estimate(float(value), float(low), float(high))


def _resampled(comparisons: Sequence[Sequence[Part]], strata: range) -> np.ndarray:
    """Values of the comparisons for resampled items and seeds: (comparisons, RESAMPLES)."""
    columns = [np.concatenate([part[k] for parts in comparisons for part in parts]).T.astype(float) for k in strata]
    means = sum(_resampled_means(column, k) for k, column in enumerate(columns)) / len(strata)
    if len(means) == len(comparisons):  # none has several seeds
        return means
    found, at = np.zeros((len(comparisons), RESAMPLES)), 0
    for i, parts in enumerate(comparisons):
        generator = np.random.default_rng(len(strata))
        for part in parts:
            seeds = len(part[0])
            drawn = at + generator.integers(seeds, size=(seeds, RESAMPLES))
            found[i] += np.take_along_axis(means, drawn, axis=0).mean(axis=0)
            at += seeds
    return found


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
