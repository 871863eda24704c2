"""The benchmark's question: for a model and a scheme, is PTQ enough, or is QAT worth its cost?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evals.core.statistics import Interval
from reports.results import REFERENCE, compare, trained

ZERO_SHOT = ("zero_shot_avg8", "zero_shot_avg6")
# What each finding means for the one who has to choose.
VERDICTS = {
    "yes": "QAT is worth it",
    "no": "PTQ is enough",
    "tie": "PTQ is enough: a tie",
    "mixed": "the measures disagree",
}


@dataclass(frozen=True)
class Answer:
    """One model and scheme: the best method of each kind by perplexity (mean over seeds), and what parts them.

    `perplexity`, `kl` and `zero_shot` are the paired differences of the best QAT method from the best PTQ one, `net` is that
    of perplexity beyond what full precision gains by the same training (None without such a control). `verdict` is one
    of VERDICTS, or "" where one of the kinds is missing.
    """

    model: str
    scheme: str
    bits_per_weight: float
    ptq: list[dict[str, Any]]
    qat: list[dict[str, Any]]
    control: list[dict[str, Any]]
    perplexity: Interval | None
    net: Interval | None
    kl: Interval | None
    zero_shot: Interval | None
    verdict: str

    @property
    def choice(self) -> list[dict[str, Any]]:
        """The rows of the method to use: QAT's where it is worth it, else the cheaper PTQ's."""
        return self.qat if self.verdict == "yes" or not self.ptq else self.ptq


def answers(cells: pd.DataFrame) -> list[Answer]:
    """One answer for each model and quantized scheme that has a perplexity."""
    rows = [row for row in cells.to_dict("records") if "perplexity" in row["metrics"]]
    quantized = [row for row in rows if not row["unquantized"]]
    pairs = dict.fromkeys((row["model"], row["scheme"]) for row in quantized)
    return [_answer(*pair, rows) for pair in pairs]


def _answer(model: str, scheme: str, rows: list[dict[str, Any]]) -> Answer:
    rows = [row for row in rows if row["model"] == model]
    own = [row for row in rows if row["scheme"] == scheme]
    ptq, qat = (_best([row for row in own if trained(row) == trains]) for trains in (False, True))
    reference = [row for row in rows if row["method"] == REFERENCE]
    control, beyond = [], None
    if qat:
        source = qat[0]["trained_on"]
        same = [row for row in rows if trained(row) and row["unquantized"] and row["trained_on"] == source]
        control = same[:1]
        beyond = (control, reference[:1]) if control and reference else None
    found = {
        "perplexity": compare(qat, ptq, "perplexity"),
        "net": compare(qat, ptq, "perplexity", beyond) if beyond else None,
        "kl": compare(qat, ptq, "kl_mean"),
        "zero_shot": next((i for metric in ZERO_SHOT if (i := compare(qat, ptq, metric))), None),
    }
    bits = next((row["bits_per_weight"] for row in own if "bits_per_weight" in row["metrics"]), float("nan"))
    return Answer(model, scheme, bits, ptq, qat, control, **found, verdict=_verdict(**found))


def _verdict(perplexity: Interval | None, net: Interval | None, kl: Interval | None, zero_shot: Interval | None) -> str:
    """ "yes" if QAT is better in a measure and worse in none, "no" if the other way round, "tie" if nothing tells them apart.

    Perplexity counts beyond the control where there is one: what full precision gains by reading the same text is the text's
    merit, not that of quantization-aware training.
    """
    if perplexity is None:
        return ""
    found = [(net or perplexity).verdict(higher_is_better=False)]
    found += [kl.verdict(higher_is_better=False)] if kl else []
    found += [zero_shot.verdict(higher_is_better=True)] if zero_shot else []
    better, worse = "better" in found, "worse" in found
    if better and worse:
        return "mixed"
    return "yes" if better else "no" if worse else "tie"


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the method with the lowest perplexity, one per seed."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return min(methods.values(), key=lambda group: np.mean([row["perplexity"] for row in group]), default=[])
