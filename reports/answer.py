"""The benchmark's question: for a model and a scheme, is PTQ enough, or is QAT worth its cost?

The best QAT method is compared with the best PTQ one, and with the best PTQ of a model that was fine-tuned on the same text:
what lies beyond the latter is the merit of quantization-aware training, of which the former must see something. A method is
chosen on one half of the windows and judged on the other, both ways: on the windows that chose it, the best of many is partly
lucky. With several texts each is a measure of its own, and methods are chosen by all of them together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from reports.cells import CONTROL_PTQ, PTQ, QUANTIZED, Cell
from reports.comparisons import (
    Halves,
    Replicates,
    best_method,
    by_method,
    compare_all,
    controls_of,
    most_seeds,
    reference_of,
)
from reports.metrics import REGISTER, Metric, measured_as
from reports.statistics import Interval, holm, items_to_decide, outcome


@dataclass(frozen=True)
class Measure:
    """A part of a verdict: its name, its metric, and the name of its margin of equivalence in the configuration."""

    heading: str
    metric: Metric
    margin: str

    def on(self, text: str) -> Measure:
        """The same on another text."""
        return Measure(f"{self.heading} ({text})", self.metric.on(text), self.margin)


MEASURES = {
    "perplexity": Measure("perplexity", REGISTER["perplexity"], "perplexity"),
    "kl": Measure("KL", REGISTER["kl_mean"], "kl"),
    "zero_shot": Measure("zero-shot", REGISTER["zero_shot_avg8"], "accuracy"),
}
EQUIVALENCE = {"perplexity": 0.01, "kl": 0.01, "accuracy": 0.01}  # for an older matrix.json, which does not say
# What each verdict means for the one who has to choose.
VERDICTS = {
    "yes": "QAT is worth it",
    "no": "PTQ is enough",
    "mixed": "The measures disagree",
    "undecided": "Undecided",
    "nothing to win": "Nothing to win",
    "no control": "No verdict: there is no control on this text",
}


@dataclass(frozen=True)
class Difference:
    """How two methods differ in a measure: "better", "worse", "equivalent" or "undecided", corrected for all measures."""

    interval: Interval
    outcome: str
    items: str  # that it is a mean over, in a word
    needed: float | None  # how many of these would decide, where they do not; None after several seeds

    @property
    def to_decide(self) -> str:
        """How many items would decide, to two digits; empty if they do, or if no number would."""
        return f"about {float(f'{self.needed:.2g}'):,.0f} {self.items}" if self.needed else ""


Differences = dict[str, Difference]  # by the name of a measure; those that both methods have


def measure_of(name: str) -> Measure:
    """A part of a verdict by its name: one of MEASURES, or `perplexity-c4` for that on another text."""
    plain, _, text = name.partition("-")
    return MEASURES[plain].on(text) if text else MEASURES[plain]


def _measured(sampled: Collection[str]) -> dict[str, str]:
    """The names of the measures and the metric of each, once for each text that it was measured on."""
    measured = {}
    for name, measure in MEASURES.items():
        measured[name] = measured_as(measure.metric.name, sampled)
        measured |= {f"{name}-{text}": measure.metric.on(text).name for text in measure.metric.texts(sampled)}
    return measured


@dataclass(frozen=True)
class Answer:
    """One model, scheme and budget: the best method of each kind by log perplexity (mean over seeds and texts), and how they
    differ.

    `against_ptq` are the differences of QAT from the best PTQ. `beyond` are those from `control`, the best PTQ of a model
    that was fine-tuned on as much of the same texts; without such a model `beyond` is empty. Compared are
    the methods that each half of the windows chooses for the other: `halves` names these by kind where they are not the best
    of all windows. `lost` is the perplexity of PTQ against full precision's, of the text on which it is the largest.
    `verdict` is one of VERDICTS, or "" where PTQ or QAT is missing; there is nothing to win if PTQ lies within the margin
    of full precision on all texts. `seeds`: the fewest of a compared method that reads text. `by_seed`: of several,
    `against_ptq` and `beyond` of the same methods with each alone. `missing`: the measures that some cell has and in which
    QAT was not compared with PTQ or with the control; they leave nothing but "undecided" to say. `tried`: how many methods of
    each kind were compared to find the best. `absent`: those of the scheme and budget without a perplexity; one of them may
    be the best. `ptq_fine_tuned`: whether a fine-tuned model was quantized as the best PTQ does it.
    """

    model: str
    scheme: str
    budget: int | None
    ptq: Replicates
    control: Replicates
    qat: Replicates
    halves: dict[str, tuple[str, ...]]
    against_ptq: Differences
    beyond: Differences
    lost: Interval | None
    verdict: str
    seeds: int
    by_seed: dict[int, tuple[Differences, Differences]]
    missing: tuple[str, ...]
    tried: Mapping[str, int]
    absent: tuple[str, ...]
    ptq_fine_tuned: bool

    @property
    def several_texts(self) -> bool:
        """Whether perplexity was measured on more than one."""
        return len(REGISTER["perplexity"].everywhere(self.ptq[0].samples)) > 1 if self.ptq else False

    @property
    def one_seed(self) -> bool:
        """Whether a method that was compared has a single seed: how much another changes is then in no interval."""
        return bool(self.qat) and self.seeds == 1

    @property
    def seeds_differ(self) -> bool:
        """Whether with one of the seeds a difference that decided goes the other way.

        What each alone would decide is no evidence: over its items, and without what seeds do, it nearly always decides
        something (reports/LOG.md).
        """
        return self.verdict in ("yes", "no", "mixed") and any(
            difference.interval.value * alone[name].interval.value < 0
            for pair in self.by_seed.values()
            for whole, alone in zip((self.against_ptq, self.beyond), pair, strict=True)
            for name, difference in whole.items()
            if difference.outcome in ("better", "worse") and name in alone
        )

    @property
    def settled(self) -> bool:
        """Whether it says which of the two to use. One seed does not: three of them, each taken alone, did not
        agree (reports/LOG.md). Nor do seeds that differ, nor a comparison from which a method is absent."""
        stands = self.verdict in ("yes", "no") and not (self.one_seed or self.seeds_differ or self.absent)
        return stands or self.verdict == "nothing to win"

    @property
    def bits_per_weight(self) -> float:
        sizes = (cell.value("bits_per_weight") for cell in (*self.ptq, *self.qat))
        return next((size for size in sizes if not math.isnan(size)), math.nan)

    @property
    def choice(self) -> Replicates:
        """The cells of the method to use: QAT's where it is worth it, else the cheaper PTQ's."""
        return self.qat if (self.verdict == "yes" and self.settled) or not self.ptq else self.ptq

    def times(self, cost: str) -> float:
        """A cost of QAT as a multiple of PTQ's, means over seeds; NaN without one of them, or if PTQ's is nothing."""
        ptq = mean(self.ptq, cost) if self.ptq and self.qat else 0
        return mean(self.qat, cost) / ptq if ptq else math.nan


def mean(replicates: Replicates, name: str) -> float:
    """Of a metric or a fact, over seeds."""
    return sum(cell.value(name) for cell in replicates) / len(replicates)


def answers(cells: Iterable[Cell], margins: Mapping[str, float]) -> list[Answer]:
    """One answer for each model, quantized scheme and budget with perplexity by window; `margins`: of equivalence."""
    cells = list(cells)
    questions = {
        (*scheme, budget): [cell for cell in group if cell.budget in (None, budget)]
        for scheme, group in by_scheme(cells).items()
        for budget in sorted({cell.budget for cell in group if cell.budget}) or [None]
    }
    sampled = {metric for group in questions.values() for cell in group for metric in cell.samples}
    metrics = _measured(sampled)
    candidates = [_Candidates.of(group) for group in questions.values()]
    alone = [c.by_seed() for c in candidates]
    differences = _all_differences([*candidates, *(c for seeds in alone for c in seeds.values())], metrics, margins)
    references = [[r] if (r := reference_of(group[0], cells)) else [] for group in questions.values()]
    texts = [metric.name for metric in REGISTER["perplexity"].everywhere(sampled)]
    pairs = [(c.by_half[0], (r, r), text) for c, r in zip(candidates, references, strict=True) for text in texts]
    losses = iter(compare_all(pairs))
    results = []
    for (key, group), c, seeds in zip(questions.items(), candidates, alone, strict=True):
        against_ptq, beyond = differences[c]
        by_seed = {seed: differences[of_seed] for seed, of_seed in seeds.items()}
        loss = [next(losses) for _ in texts]
        lost = max(loss, key=lambda interval: interval.high) if all(loss) else None
        nothing = lost and lost.high <= margins["perplexity"]
        compared = against_ptq.keys() & beyond.keys() if beyond else against_ptq.keys()
        there = [name for name, metric in metrics.items() if any(metric in cell.samples for cell in group)]
        missing = tuple(name for name in there if name not in compared) if against_ptq else ()
        verdict = "nothing to win" if nothing else _verdict(against_ptq, beyond)
        if missing and verdict in ("yes", "no", "mixed"):
            verdict = "undecided"
        results.append(
            Answer(
                *key,
                *c.best,
                c.halves(),
                against_ptq,
                beyond,
                lost,
                verdict,
                c.seeds(),
                by_seed,
                missing,
                tried={kind: len(by_method(cell for cell in group if cell.kind == kind)) for kind in QUANTIZED},
                absent=_absent(cells, *key),
                ptq_fine_tuned=_quantizes_fine_tuned(c.best[0], group),
            )
        )
    return results


def _absent(cells: Iterable[Cell], model: str, scheme: str, budget: int | None) -> tuple[str, ...]:
    """The methods of a question of which some cell has no perplexity by window."""
    asked = [c for c in cells if (c.model, c.scheme) == (model, scheme) and c.quantized and c.budget in (None, budget)]
    return tuple(dict.fromkeys(c.method for c in asked if "perplexity" not in c.samples))


def _quantizes_fine_tuned(ptq: Replicates, cells: Iterable[Cell]) -> bool:
    """Whether some cell is a fine-tuned model that was quantized as the cells of a PTQ method are."""
    return not ptq or any(c.kind == CONTROL_PTQ and c.run.quantizer == ptq[0].run.quantizer for c in cells)


def by_scheme(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The quantized cells that have perplexity by window, by model and scheme."""
    schemes: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.quantized and "perplexity" in cell.samples:
            schemes.setdefault((cell.model, cell.scheme), []).append(cell)
    return schemes


def choosing_halves(cells: Iterable[Cell]) -> tuple[slice | None, slice | None]:
    """The windows by which a method is chosen for the even items, and those for the odd items: each time the others. A single
    window has no halves."""
    windows = min(len(cell.samples["perplexity"][0].values) for cell in cells)
    return (slice(1, None, 2), slice(0, None, 2)) if windows > 1 else (None, None)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The methods that an answer compares, one for each kind of QUANTIZED: the best by all windows, and by each half of them
    for the other."""

    best: tuple[Replicates, ...]
    by_half: tuple[Halves, ...]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> _Candidates:
        ptq, controls, qat = (by_method(c for c in cells if c.kind == kind) for kind in QUANTIZED)
        qat = most_seeds(qat)

        def chosen(windows: slice | None) -> tuple[Replicates, ...]:
            best = best_method(qat, windows)
            control = best_method(controls_of(best[0], controls), windows) if best else []
            return best_method(ptq, windows), control, best

        return cls(chosen(None), tuple(zip(*map(chosen, choosing_halves(cells)), strict=True)))

    def halves(self) -> dict[str, tuple[str, ...]]:
        """By kind the methods that the halves choose, where one is not the best of all windows."""
        otherwise = {}
        for kind, best, halves in zip(QUANTIZED, self.best, self.by_half, strict=True):
            if any(half is not best for half in halves if half):
                otherwise[kind] = tuple(dict.fromkeys(half[0].method for half in halves if half))
        return otherwise

    def seeds(self) -> int:
        """The fewest of a compared method; rounding, which reads no text, has none."""
        compared = [replicates for replicates in itertools.chain(self.best, *self.by_half) if replicates]
        reads = [r for r in compared if r[0].kind != PTQ or not math.isnan(r[0].run.calibration_tokens)]
        return min(map(len, reads), default=0)

    def by_seed(self) -> dict[int, _Candidates]:
        """Where QAT has several seeds, the same methods with each of them alone; what has a single one belongs to all."""
        several = {cell.seed for replicates in self.by_half[-1] if len(replicates) > 1 for cell in replicates}

        def alone(seed: int, replicates: Replicates) -> Replicates:
            return [cell for cell in replicates if cell.seed == seed or len(replicates) == 1]

        def halved(seed: int, halves: Halves) -> Halves:
            even, odd = (alone(seed, half) for half in halves)
            return (even, even) if halves[0] is halves[1] else (even, odd)

        return {
            seed: _Candidates(
                tuple(alone(seed, best) for best in self.best), tuple(halved(seed, halves) for halves in self.by_half)
            )
            for seed in sorted(several)
        }


def _all_differences(
    candidates: Sequence[_Candidates], metrics: dict[str, str], margins: Mapping[str, float]
) -> dict[_Candidates, tuple[Differences, Differences]]:
    """Of the best QAT from the best PTQ, and from that of the fine-tuned model. All at once, which is much faster."""
    pairs = [(qat, rival) for *rivals, qat in (c.by_half for c in candidates) for rival in rivals]
    intervals = iter(compare_all([(*pair, metric) for pair in pairs for metric in metrics.values()]))

    def following(rival: Halves, qat: Halves) -> Differences:
        return _differences({name: next(intervals) for name in metrics}, metrics, qat, rival, margins)

    return {c: (following(ptq, qat), following(control, qat)) for c in candidates for ptq, control, qat in [c.by_half]}


def _differences(
    intervals: dict[str, Interval | None],
    metrics: dict[str, str],
    qat: Halves,
    rival: Halves,
    margins: Mapping[str, float],
) -> Differences:
    """The outcome of each measure's interval, corrected for their number."""
    # More items narrow the interval of one training; that of several is as wide as these differ, too, and that of two
    # methods, each on one half, as these do.
    one = len(qat[0]) == 1 and qat[0] is qat[1] and rival[0] is rival[1]
    known = {name: interval for name, interval in intervals.items() if interval}
    differences = {}
    for (name, interval), p in zip(known.items(), holm([i.p for i in known.values()]), strict=True):
        measure, metric = measure_of(name), metrics[name]
        margin = margins[measure.margin]
        kind = outcome(interval, p, margin, higher_is_better=measure.metric.higher_is_better)
        n = sum(len(stratum.values) for stratum in qat[0][0].samples[metric])
        needed = items_to_decide(interval, n, margin, len(known)) if one and kind == "undecided" else math.inf
        items = qat[0][0].metrics[metric].items
        differences[name] = Difference(interval, kind, items, needed if math.isfinite(needed) else None)
    return differences


def _verdict(against_ptq: Differences, beyond: Differences) -> str:
    """ "yes" if QAT is better than its control in a measure and worse in none, and so it is against plain PTQ.

    What it gains over PTQ alone decides nothing, since reading the same text accounts for a part of that. Nor does what it
    gains over the control alone, since not moving as far from the model as fine-tuning does accounts for a part of that. "no"
    if it is worse than either in a measure and better in none, or equal to either in all.
    """
    if "perplexity" not in against_ptq:
        return ""
    if "perplexity" not in beyond:
        return "no control"
    mine, plain = ({difference.outcome for difference in differences.values()} for differences in (beyond, against_ptq))
    if "worse" in plain and "better" not in plain:
        return "no"
    if "better" in mine and ("worse" in mine or "worse" in plain):
        return "mixed"
    if "better" in mine and "better" in plain:
        return "yes"
    if "worse" in mine or mine == {"equivalent"} or plain == {"equivalent"}:
        return "no"
    return "undecided"
