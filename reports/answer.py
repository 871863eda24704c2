"""The benchmark's question: for a model and a scheme, is PTQ enough, or is QAT worth its cost?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evals.core.statistics import Interval
from reports.results import REFERENCE, best_method, compare_all, trained

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
    ptq: list[dict[str, Any]]
    qat: list[dict[str, Any]]
    perplexity: Interval | None
    net: Interval | None
    kl: Interval | None
    zero_shot: Interval | None
    verdict: str

    @property
    def bits_per_weight(self) -> float:
        return next(
            (row["bits_per_weight"] for row in self.ptq + self.qat if "bits_per_weight" in row["metrics"]), math.nan
        )

    @property
    def choice(self) -> list[dict[str, Any]]:
        """The rows of the method to use: QAT's where it is worth it, else the cheaper PTQ's."""
        return self.qat if self.verdict == "yes" or not self.ptq else self.ptq


def answers(cells: pd.DataFrame) -> list[Answer]:
    """One answer for each model and quantized scheme that has a perplexity."""
    rows = [row for row in cells.to_dict("records") if "perplexity" in row["metrics"]]
    quantized = [row for row in rows if not row["unquantized"]]
    sides = [_sides(*pair, rows) for pair in dict.fromkeys((row["model"], row["scheme"]) for row in quantized)]
    zero_shot = ZERO_SHOT[0] if any(ZERO_SHOT[0] in row["samples"] for row in rows) else ZERO_SHOT[1]
    comparisons = []
    for s in sides:
        comparisons += [(s["qat"], s["ptq"], metric, None) for metric in ("perplexity", "kl_mean", zero_shot)]
        comparisons.append((s["qat"], s["ptq"], "perplexity", (s["control"], s["reference"])))
    intervals = iter(compare_all(comparisons))
    found = []
    for s in sides:
        perplexity, kl, accuracy, net = (next(intervals) for _ in range(4))
        measures = {"perplexity": perplexity, "net": net, "kl": kl, "zero_shot": accuracy}
        found.append(Answer(s["model"], s["scheme"], s["ptq"], s["qat"], **measures, verdict=_verdict(**measures)))
    return found


def _sides(model: str, scheme: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows that an answer compares: the best of PTQ and of QAT, the control of the latter, and full precision."""
    rows = [row for row in rows if row["model"] == model]
    own = [row for row in rows if row["scheme"] == scheme]
    ptq, qat = (best_method([row for row in own if trained(row) == trains]) for trains in (False, True))
    texts = {row["trained_on"] for row in qat}
    controls = [row for row in rows if trained(row) and row["unquantized"] and row["trained_on"] in texts]
    control = [row for row in controls if row["method"] == controls[0]["method"]]
    reference = [row for row in rows if row["method"] == REFERENCE]
    return {
        "model": model,
        "scheme": scheme,
        "ptq": ptq,
        "qat": qat,
        "control": control,
        "reference": reference,
    }


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
