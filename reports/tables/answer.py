"""The best method of each kind for each model and scheme, their differences, and the costs of QAT relative to PTQ."""

from __future__ import annotations

import math
from dataclasses import replace

from reports.answer import Difference, mean, measure_of
from reports.cells import CONTROL_PTQ, PTQ, QAT, QUANTIZED, Cell
from reports.comparisons import Replicates
from reports.document import ANSWER, Entry, Place, Table
from reports.metrics import COSTS, Metric, significant
from reports.tables._entries import change, number, scaled, table_of, word
from reports.tree import Results

PLACE = Place(ANSWER, per_model=False)
NOTE = """\
The best method of each kind by perplexity (its logarithm's mean over texts, where there are several); that of the
first text is in brackets. *Fine-tune, then PTQ*: full precision is trained on the text that QAT was trained on
(*training tokens*, which a recipe may read several times), and then quantized without training. *Against ...*: QAT's
value minus the other's on the same items, with the 95 % interval. Methods are chosen on one half of the windows and
judged on the other half of all items, both ways; where the halves choose otherwise than all windows, the brackets say
so. **Worth it** is about what lies beyond fine-tuned PTQ, by the first that holds: nothing to win, if plain PTQ's
perplexity lies within the margin of full precision's on every text; no control, if nothing fine-tuned on QAT's texts
was quantized; no, if QAT is worse than plain PTQ in a measure and better in none; mixed, if it is better than
fine-tuned PTQ in one, and worse than that or plain PTQ in one; yes, if it is better than both; no, if it is worse
than fine-tuned PTQ in one, or equivalent to one of them in all; undecided else. After a training with one seed a
verdict is open: how much another seed would change is in no interval. Nor does a verdict stand if with one of several
seeds a difference that decided goes the other way (*seeds differ*), nor if a method of the matrix has no result
(*methods absent*), for it may be the best; of methods that train, those with the most seeds alone compete.
*Equivalent*: the interval lies within the margin of the configuration. *Better*, *worse*: p < 5 % after Holm's
correction for the measures of a comparison, and the interval lies beyond the margin. An interval that holds both
decides nothing; after *undecided*, about how many windows or questions would decide, if the estimate stayed (after
several seeds none is told: seeds may be what is missing). *Time*, *memory*: QAT's as a multiple of PTQ's, to quantize
once, each peak against the other's of the same kind."""


def table(cells: list[Cell], results: Results) -> Table | None:
    answers = results.answers
    costs = [cost for cost in COSTS if any(not math.isnan(a.times(cost.name)) for a in answers)]
    measures = {name: measure_of(name) for a in answers for name in a.against_ptq}
    rows = []
    for a in answers:
        row = {"model": word(a.model), "scheme": word(a.scheme), "bits/weight": number(a.bits_per_weight)}
        row["training tokens"] = scaled(a.qat[0].run.text_tokens if a.qat else math.nan, 1, "{:,.0f}")
        seeds = ", one seed" if a.verdict and a.one_seed else ", seeds differ" if a.seeds_differ else ""
        seeds += ", methods absent" if a.verdict and a.absent else ""
        mark = "best" if a.verdict == "yes" and a.settled else ""
        row["QAT worth it"] = Entry(f"{a.verdict or '-'}{seeds}", a.verdict, mark=mark)
        for name, best, kind in (
            ("best PTQ", a.ptq, PTQ),
            (QUANTIZED[CONTROL_PTQ], a.control, CONTROL_PTQ),
            ("best QAT", a.qat, QAT),
        ):
            row[name] = _method(best, a.halves.get(kind, ()))
        for rival, differences in (("fine-tuned PTQ", a.beyond), ("PTQ", a.against_ptq)):  # what decides, first
            for name, measure in measures.items():
                row[f"{measure.heading} against {rival}"] = _difference(differences.get(name), measure.metric)
        row |= {cost.heading: scaled(a.times(cost.name), 1, "{:.1f} x") for cost in costs}
        rows.append(row)
    return table_of("answer", ANSWER, rows, NOTE)


def _method(replicates: Replicates, halves: tuple[str, ...]) -> Entry:
    """A method, its mean perplexity over seeds, and the methods that the halves of the windows choose."""
    if not replicates:
        return Entry("none")
    about = [significant(mean(replicates, "perplexity"))]
    about += [f"{len(replicates)} seeds"] if len(replicates) > 1 else []
    about += [f"halves choose {' and '.join(halves)}"] if halves else []
    return Entry(replicates[0].method, replicates[0].method, f"({', '.join(about)})")


def _difference(difference: Difference | None, metric: Metric) -> Entry:
    if difference is None:
        return Entry("")
    entry = change(difference.interval, metric, difference.outcome)
    return replace(entry, detail=", ".join(part for part in (entry.detail, difference.to_decide) if part))
