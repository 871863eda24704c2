"""From which budget on each method that trains is ahead of the best PTQ, and what it wins back."""

from __future__ import annotations

import math

from reports.answer import mean
from reports.cells import QUANTIZED, Cell
from reports.crossing import Curve, lies_between
from reports.document import QAT_AGAINST_PTQ, Entry, Place, Table
from reports.prose import crossing_words
from reports.statistics import Estimate
from reports.tables._entries import number, scaled, table_of, word
from reports.tree import Results

PLACE = Place(QAT_AGAINST_PTQ, order=-1)
NOTE = """\
*Ahead from*: the training budget from which on the method has a lower perplexity (of the first text, where there are
several) than the scheme's best PTQ, on a straight line in the logarithm of the budget between those that were run,
with the 95 % interval over windows and seeds; *minutes*: to quantize with that budget on this machine; *of
fine-tuned*: likewise, than the best PTQ of a model fine-tuned on as much of the same texts. A measure in brackets:
the same methods in that one. *Won back*: with the
largest budget, the share of what PTQ loses against full precision, in log perplexity; *beyond fine-tuning*: that
share less what PTQ of that model wins back. The perplexities are those of the budgets in rising order, means over
seeds."""


def table(cells: list[Cell], results: Results) -> Table | None:
    rows = []
    for (model, _), found in results.crossings.items():
        for curve in found.curves if model == cells[0].model else ():
            row = {"scheme": word(curve.scheme), "method": word(curve.method), "kind": word(QUANTIZED[curve.kind])}
            row |= {"best PTQ": word(curve.ptq[0].method), "ahead from": _ahead(curve.crossing, curve)}
            crosses = lies_between(curve.crossing)
            row["minutes"] = number(curve.minutes(curve.crossing.value) if crosses else math.nan)
            row["of fine-tuned"] = _ahead(curve.against_control, curve)
            for metric, (crossing, against_control) in curve.elsewhere.items():
                row[f"ahead from ({metric.heading})"] = _ahead(crossing, curve)
                row[f"of fine-tuned ({metric.heading})"] = _ahead(against_control, curve)
            row["won back %"], row["beyond fine-tuning %"] = _share(curve.recovered), _share(curve.beyond)
            row["seeds"] = scaled(curve.seeds, 1, "{:.0f}")
            for budget, replicates in curve.replicates.items():
                row[f"{budget:,}"] = number(mean(replicates, "perplexity"))
            rows.append(row)
    return table_of(f"{cells[0].model}-crossing", "From which budget on", rows, NOTE)


def _ahead(crossing: Estimate | None, curve: Curve) -> Entry:
    if crossing is None:
        return Entry("")
    text, between = crossing_words(crossing, curve.budgets)
    return Entry(text, crossing.value if math.isfinite(crossing.value) else None, between)


def _share(estimate: Estimate | None) -> Entry:
    if estimate is None:
        return Entry("")
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return Entry(f"{value:.0f}", value, f"[{low:.0f}, {high:.0f}]")
