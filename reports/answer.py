"""The benchmark's question: for a model and a scheme, is PTQ enough, or is QAT worth its cost?

The best QAT method is compared with the best PTQ one, and with the best PTQ of a model that was fine-tuned on the same text:
what lies beyond the latter is the merit of quantization-aware training, of which the former must see something. A method is
chosen on one half of the windows and judged on the other, both ways, so that the best of many is not judged by the luck that
made it the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from methods.core.statistics import Interval, holm, items_to_decide, outcome
from reports.results import QUANTIZED, Halves, Side, best_method, by_method, compare_all, controls_of

ZERO_SHOT = ("zero_shot_avg8", "zero_shot_avg6")
# What a verdict is made of: its metric, its margin of equivalence in the configuration, and what it is a mean over.
MEASURES = {
    "perplexity": ("perplexity", "perplexity", "windows"),
    "kl": ("kl_mean", "kl", "windows"),
    "zero_shot": (ZERO_SHOT[0], "accuracy", "questions"),
}
EQUIVALENCE = {"perplexity": 0.01, "kl": 0.01, "accuracy": 0.01}  # of a matrix.json that has none
# What each finding means for the one who has to choose.
VERDICTS = {
    "yes": "QAT is worth it",
    "no": "PTQ is enough",
    "mixed": "The measures disagree",
    "undecided": "Undecided",
    "no control": "No verdict: there is no control on this text",
}


@dataclass(frozen=True)
class Difference:
    """How two sides differ in a measure: "better", "worse", "equivalent" or "undecided", corrected for all measures."""

    interval: Interval
    outcome: str
    items: str  # what it is a mean over
    needed: float | None  # how many of these would decide, where they do not


Differences = dict[str, Difference]  # by measure; those that both sides have


@dataclass(frozen=True)
class Answer:
    """One model and scheme: the best method of each kind by perplexity (mean over seeds), and what parts them.

    `against_ptq` are the differences of QAT from the best PTQ, `beyond` those from the best PTQ of a model that was
    fine-tuned on as many tokens of the same text (`control`); empty without such a control. They are of the methods that each
    half of the windows chooses for the other: `halves` names these by kind where they are not the best of all windows.
    `verdict` is one of VERDICTS, or "" where PTQ or QAT is missing.
    """

    model: str
    scheme: str
    ptq: Side
    control: Side
    qat: Side
    halves: dict[str, tuple[str, ...]]
    against_ptq: Differences
    beyond: Differences
    verdict: str

    @property
    def bits_per_weight(self) -> float:
        rows = [*self.ptq, *self.qat]
        return next((row["bits_per_weight"] for row in rows if "bits_per_weight" in row["metrics"]), math.nan)

    @property
    def choice(self) -> Side:
        """The rows of the method to use: QAT's where it is worth it, else the cheaper PTQ's."""
        return self.qat if self.verdict == "yes" or not self.ptq else self.ptq


def answers(cells: pd.DataFrame, margins: Mapping[str, float] = EQUIVALENCE) -> list[Answer]:
    """One answer for each model and quantized scheme that has a perplexity; `margins` of equivalence as configured."""
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in cells.to_dict("records"):
        if row["kind"] in QUANTIZED and "perplexity" in row["metrics"]:
            places.setdefault((row["model"], row["scheme"]), []).append(row)
    complete = any(ZERO_SHOT[0] in row["samples"] for rows in places.values() for row in rows)
    metrics = {name: metric for name, (metric, _, _) in MEASURES.items()}
    metrics |= {} if complete else {"zero_shot": ZERO_SHOT[1]}
    sides = [_Sides(rows) for rows in places.values()]
    pairs = [(s.qat_by_half, rival) for s in sides for rival in (s.ptq_by_half, s.control_by_half)]
    intervals = iter(compare_all([(*pair, metric) for pair in pairs for metric in metrics.values()]))
    found = []
    for (model, scheme), s in zip(places, sides, strict=True):
        compared = [
            _differences({name: next(intervals) for name in metrics}, metrics, s.qat, margins)
            for _ in ("ptq", "control")
        ]
        found.append(Answer(model, scheme, s.ptq, s.control, s.qat, s.halves(), *compared, _verdict(*compared)))
    return found


class _Sides:
    """What an answer compares: the best of each kind by all windows, and by each half of them for the other."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        ptq, controls, qat = (by_method(r for r in rows if r["kind"] == kind).values() for kind in QUANTIZED)
        self.ptq, self.qat = best_method(ptq), best_method(qat)
        self.control = best_method(controls_of(self.qat[0], controls)) if self.qat else []
        windows = min(len(row["samples"]["perplexity"].strata[0]) for row in rows)
        # Even items are judged by what the odd windows choose, and the reverse. A single window has no halves.
        choosing = (slice(1, None, 2), slice(0, None, 2)) if windows > 1 else (None, None)
        self.ptq_by_half: Halves = tuple(best_method(ptq, half) for half in choosing)
        self.qat_by_half: Halves = tuple(best_method(qat, half) for half in choosing)
        self.control_by_half: Halves = tuple(
            best_method(controls_of(side[0], controls), half) if side else []
            for side, half in zip(self.qat_by_half, choosing, strict=True)
        )

    def halves(self) -> dict[str, tuple[str, ...]]:
        """By kind the methods that the halves choose, where one is not the best of all windows."""
        found = {}
        for kind, best, halves in (
            ("ptq", self.ptq, self.ptq_by_half),
            ("control_ptq", self.control, self.control_by_half),
            ("qat", self.qat, self.qat_by_half),
        ):
            if any(side is not best for side in halves if side):
                found[kind] = tuple(dict.fromkeys(side[0]["method"] for side in halves if side))
        return found


def _differences(
    intervals: dict[str, Interval | None], metrics: dict[str, str], qat: Side, margins: Mapping[str, float]
) -> Differences:
    """What intervals of several measures say together."""
    known = {name: interval for name, interval in intervals.items() if interval}
    found = {}
    for (name, interval), p in zip(known.items(), holm([i.p for i in known.values()]), strict=True):
        margin, items = margins[MEASURES[name][1]], MEASURES[name][2]
        kind = outcome(interval, p, margin, higher_is_better=qat[0]["metrics"][metrics[name]]["higher_is_better"])
        n = sum(map(len, qat[0]["samples"][metrics[name]].strata))
        needed = items_to_decide(interval, n, margin, len(known)) if kind == "undecided" else math.inf
        found[name] = Difference(interval, kind, items, needed if math.isfinite(needed) else None)
    return found


def _verdict(against_ptq: Differences, beyond: Differences) -> str:
    """ "yes" if QAT is better than its control in a measure and worse in none, and so it is against plain PTQ.

    What it gains over PTQ alone decides nothing: of that, reading the same text has its share. Nor does what it gains over
    the control alone: of that, not moving as far from the model as fine-tuning does. "no" if it is worse than the control in
    a measure and better in none, or equal to either in all.
    """
    if "perplexity" not in against_ptq:
        return ""
    if "perplexity" not in beyond:
        return "no control"
    mine, plain = ({difference.outcome for difference in found.values()} for found in (beyond, against_ptq))
    if "better" in mine and ("worse" in mine or "worse" in plain):
        return "mixed"
    if "better" in mine and "better" in plain:
        return "yes"
    if "worse" in mine or mine == {"equivalent"} or plain == {"equivalent"}:
        return "no"
    return "undecided"
