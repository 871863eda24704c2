"""From which training budget on QAT is better than PTQ: the crossing of two curves of perplexity, and what QAT recovers.

For a model and a scheme let d(B) be the mean over windows of the log perplexity of a QAT method that was trained on B tokens,
less that of the best PTQ. Between the budgets that were run, d is a straight line in log B. The crossing is the budget from
which on d stays at or below zero, so that a curve which comes back has not crossed. Its interval is that of the crossings of
resampled differences: windows and seeds are drawn for all budgets alike, since they are the same ones.

The best PTQ, and the best QAT method, are chosen on one half of the windows and judged on the other, both ways, as for the
verdict (answer.py): by all texts, where there are several. The curves are of the first one; the same methods cross in further
texts and in KL divergence, too, each on its own items, and elsewhere or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reports.answer import by_scheme, choosing_halves, mean
from reports.cells import CONTROL_PTQ, PTQ, QAT, Cell
from reports.comparisons import (
    Halves,
    Replicates,
    best_method,
    by_method,
    controls_of,
    mean_loss,
    reference_of,
    resample_all,
    shared_texts,
)
from reports.metrics import REGISTER, Metric
from reports.statistics import Estimate, percentiles

METRIC = "perplexity"
FURTHER = ("perplexity", "kl_mean")  # what else methods cross in, on all texts
Windows = slice | None  # None: all of them


@dataclass(frozen=True)
class Curve:
    """A method over its budgets against the best PTQ of its model and scheme.

    replicates: by budget, in rising order. halves: the methods that the halves of the windows choose, where the method is
    the best of all windows and they choose otherwise; the estimates are then theirs. crossing: with PTQ, in training tokens,
    0 if the method is ahead with all budgets, infinite if it is not with the largest. against_control: likewise, with the
    best PTQ of models that were fine-tuned on as much of the same texts as it, for QAT where there is one for each budget.
    elsewhere: both in every other measure, in which all these cells were scored.
    recovered: at the largest budget, the share of what PTQ loses against full precision, in log perplexity, that the method
    wins back; beyond: that share less what the best PTQ of a model fine-tuned on as much of the same texts wins back. Both
    are None without full precision or where PTQ is not told apart from it, beyond also without such a model.
    """

    model: str
    scheme: str
    method: str
    kind: str
    ptq: Replicates
    replicates: dict[int, Replicates]
    halves: tuple[str, ...]
    crossing: Estimate
    against_control: Estimate | None
    elsewhere: dict[Metric, tuple[Estimate, Estimate | None]]
    recovered: Estimate | None
    beyond: Estimate | None

    @property
    def budgets(self) -> list[int]:
        return list(self.replicates)

    @property
    def last(self) -> Replicates:
        """The cells of the largest budget."""
        return self.replicates[self.budgets[-1]]

    @property
    def seeds(self) -> int:
        return min(map(len, self.replicates.values()))

    def minutes(self, tokens: float) -> float:
        """To quantize with so many training tokens, on the machine of the run: on a straight line between budgets."""
        taken = [mean(replicates, "seconds") / 60 for replicates in self.replicates.values()]
        return float(np.interp(tokens, self.budgets, taken))


def lies_between(crossing: Estimate | None) -> bool:
    """Whether a crossing lies between budgets that were run."""
    return crossing is not None and 0 < crossing.value < math.inf


@dataclass(frozen=True)
class Crossings:
    """The curves of a model and scheme, the earliest crossing first. best: that of the best QAT method, which each half of
    the windows chooses for the other."""

    curves: list[Curve]
    best: Curve | None


def crossings(cells: Sequence[Cell]) -> dict[tuple[str, str], Crossings]:
    """By model and scheme; only those with PTQ and with a method that was trained with several budgets."""
    found = {}
    for key, group in by_scheme(cells).items():
        reference = reference_of(group[0], cells)
        scheme = _Scheme(group, [reference] if reference else [])
        if scheme.ptq and scheme.methods:
            found[key] = Crossings(scheme.curves(), scheme.best())
    return {key: each for key, each in found.items() if each.curves}


class _Scheme:
    """The cells of a model and scheme as what curves are made of."""

    def __init__(self, cells: Sequence[Cell], reference: Replicates):
        self.key = cells[0].model, cells[0].scheme
        self.halves, self.reference = choosing_halves(cells), reference
        measured = {name for cell in cells for name in cell.samples}
        further = [metric for name in FURTHER for metric in REGISTER[name].everywhere(measured)]
        self.further = [metric for metric in further if metric.name != METRIC]
        self.ptq, self.controls = (by_method(c for c in cells if c.kind == kind) for kind in (PTQ, CONTROL_PTQ))
        methods: dict[str, dict[int, Replicates]] = {}
        for replicates in by_method(c for c in cells if c.kind in (QAT, CONTROL_PTQ) and c.budget):
            methods.setdefault(replicates[0].method, {})[replicates[0].budget] = replicates
        self.methods = {name: dict(sorted(of.items())) for name, of in methods.items() if len(of) > 1}

    def curves(self) -> list[Curve]:
        """Those of all methods, the earliest crossing first, and of equal ones the lowest perplexity in the end."""
        drawn = [self._curve(name, {budget: (of[budget],) * 2 for budget in of}) for name, of in self.methods.items()]
        return sorted([c for c in drawn if c], key=lambda c: (c.crossing.value, mean(c.last, METRIC)))

    def best(self) -> Curve | None:
        """That of the QAT method that is first in that order, estimated with the methods that each half chooses."""
        qat = {name: of for name, of in self.methods.items() if next(iter(of.values()))[0].kind == QAT}
        seeds = {name: min(map(len, of.values())) for name, of in qat.items()}
        names = [name for name in qat if seeds[name] == max(seeds.values())]
        if not names:
            return None
        name, *by_half = (self._first(names, windows) for windows in (None, *self.halves))
        shared = [budget for budget in self.methods[name] if all(budget in self.methods[half] for half in by_half)]
        replicates = {budget: tuple(self.methods[half][budget] for half in by_half) for budget in shared}
        otherwise = tuple(dict.fromkeys(by_half)) if set(by_half) != {name} else ()
        return self._curve(name, replicates, otherwise) if len(shared) > 1 else None

    def _first(self, names: Sequence[str], windows: Windows) -> str:
        """The method with the earliest crossing by some of the windows, then with the least loss at its largest budget."""
        trained = [replicates for of in self.methods.values() for replicates in of.values()]
        texts = shared_texts([*self.ptq, *trained], windows)
        ptq = mean_loss(best_method(self.ptq, windows), windows, texts)

        def rank(name: str) -> tuple[float, float]:
            of = self.methods[name]
            losses = [mean_loss(replicates, windows, texts) for replicates in of.values()]
            return float(crossing(np.array(list(of)), np.array(losses) - ptq)), losses[-1]

        return min(names, key=rank)

    def _curve(self, name: str, by_half: dict[int, Halves], halves: tuple[str, ...] = ()) -> Curve | None:
        """None if some of it was not scored on the items of PTQ."""
        ptq: Halves = tuple(best_method(self.ptq, windows) for windows in self.halves)
        kind, of = next(iter(by_half.values()))[0][0].kind, {budget: self.methods[name][budget] for budget in by_half}
        with_ptq = {budget: (replicates, ptq) for budget, replicates in by_half.items()}
        with_control = {b: (mine, self._control(mine)) for b, mine in by_half.items()} if kind == QAT else {}
        found = _crossing(with_ptq, METRIC)
        if found is None:
            return None
        elsewhere = {
            metric: (other, _crossing(with_control, metric.name))
            for metric in self.further
            if (other := _crossing(with_ptq, metric.name))
        }
        recovered = beyond = None
        last = by_half[max(by_half)]
        if self.reference:
            lost = ((self.reference,) * 2, ptq, METRIC)
            recovered = _share((last, ptq, METRIC), lost)
            beyond = _share((last, self._control(last), METRIC), lost) if kind == QAT else None
        crossed = found, _crossing(with_control, METRIC), elsewhere
        return Curve(*self.key, name, kind, best_method(self.ptq), of, halves, *crossed, recovered, beyond)

    def _control(self, qat: Halves) -> Halves:
        """The best PTQ of a model that was fine-tuned on as much of the same texts; empty without one."""
        return tuple(
            best_method(controls_of(replicates[0], self.controls), windows)
            for replicates, windows in zip(qat, self.halves, strict=True)
        )


def _crossing(pairs: dict[int, tuple[Halves, Halves]], metric: str) -> Estimate | None:
    """Of a method with its rival, by budget; None without one, or if one of the comparisons cannot be made."""
    resampled = resample_all([(*pair, metric) for pair in pairs.values()]) if pairs else None
    if resampled is None:
        return None
    budgets, (values, draws) = np.array(list(pairs)), resampled
    return percentiles(crossing(budgets, values), crossing(budgets, draws))


def crossing(budgets: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The budget from which on differences (budgets, ...) are at or below zero, interpolated in the logarithm of the budget.

    0 if they are with all budgets, infinite if they are above zero with the largest.
    """
    above = differences > 0
    # Of the budgets with which it is behind, the last one; the crossing lies between that and the next.
    last = len(budgets) - 1 - np.argmax(above[::-1], axis=0)
    following = np.minimum(last + 1, len(budgets) - 1)
    before, after = (np.take_along_axis(differences, at[None], axis=0)[0] for at in (last, following))
    way = np.divide(before, before - after, out=np.zeros_like(before), where=before > after)
    logs = np.log(budgets)
    between = np.exp(logs[last] + way * (logs[following] - logs[last]))
    return np.where(above.any(axis=0), np.where(above[-1], np.inf, between), 0.0)


def _share(won: tuple[Halves, Halves, str], lost: tuple[Halves, Halves, str]) -> Estimate | None:
    """The ratio of two mean differences on the same items; None unless the second is told apart from zero."""
    resampled = resample_all([won, lost])
    if resampled is None:
        return None
    (a, b), (mine, theirs) = resampled
    known = percentiles(b, theirs)
    return None if known.low <= 0 <= known.high else percentiles(a / b, mine / theirs)
