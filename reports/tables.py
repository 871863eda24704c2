"""The report's tables, as data: what each entry says, what it is worth for sorting, and whether it is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from methods.core.statistics import Interval, seed_spread
from reports.answer import ZERO_SHOT, Answer, Difference
from reports.results import REFERENCE, Side

LOWER_IS_BETTER = ("perplexity", "kl_mean", "kl_p99")
# Metrics of the main table and of the comparisons: metric, name, and how a value is written.
HEADLINES = (
    ("perplexity", "perplexity", "number"),
    ("zero_shot_avg8", "zero-shot avg8 %", "share"),
    ("zero_shot_avg6", "zero-shot avg6 %", "share"),  # where the eight are not complete
    ("mmlu_0shot", "MMLU 0-shot %", "share"),
    ("mmlu_5shot", "MMLU 5-shot %", "share"),
    ("kl_mean", "KL", "number"),
)
DETAILS = (("kl_p99", "KL p99", "number"), ("top1_agreement", "top-1 agreement %", "share"))
# Of an answer: its measures and costs, as columns and sentences name them.
MEASURES = {"perplexity": "perplexity", "kl": "KL", "zero_shot": "zero-shot"}
COSTS = {"seconds": "time", "host_memory_mb": "host memory", "device_memory_mb": "device memory"}


@dataclass(frozen=True)
class Entry:
    """A place in a table. `value` is what it sorts by and what a spreadsheet gets; `detail` is of less weight than `text`."""

    text: str
    value: float | str | None = None
    detail: str = ""
    mark: str = ""  # "best", or "tie" with the best


@dataclass(frozen=True)
class Table:
    """A table by its file name, its title, its columns' names, rows of entries, and what a reader has to know."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    note: str = ""


def table(name: str, title: str, rows: list[dict[str, Entry]], note: str = "") -> Table | None:
    """A table of rows that may lack some of the columns; None if there are no rows."""
    if not rows:
        return None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(name, title, columns, [[row.get(c, Entry("")) for c in columns] for row in rows], note)


def answer(answers: list[Answer]) -> Table | None:
    """For each model and scheme the best of each kind, what parts them and what it costs."""
    rows = []
    costs = {cost: name for cost, name in COSTS.items() if any(not math.isnan(times(a, cost)) for a in answers)}
    for a in answers:
        row = {"model": word(a.model), "scheme": word(a.scheme), "bits/weight": number(a.bits_per_weight)}
        row["training tokens"] = scaled(a.qat[0]["training_tokens"] if a.qat else math.nan, 1, "{:,.0f}")
        row["QAT worth it"] = Entry(a.verdict or "-", a.verdict, mark="best" if a.verdict == "yes" else "")
        for name, side, kind in (
            ("best PTQ", a.ptq, "ptq"),
            ("fine-tune, then PTQ", a.control, "control_ptq"),
            ("best QAT", a.qat, "qat"),
        ):
            row[name] = _method(side, a.halves.get(kind, ()))
        for rival, found in (("PTQ", a.against_ptq), ("fine-tuned PTQ", a.beyond)):
            row |= {f"{name} against {rival}": _difference(found.get(m), m) for m, name in MEASURES.items()}
        row |= {name: scaled(times(a, cost), 1, "{:.1f} x") for cost, name in costs.items()}
        rows.append(row)
    return table("answer", "Is QAT worth it?", rows, ANSWER)


ANSWER = """\
The best method of each kind by perplexity, which is in brackets. *Fine-tune, then PTQ*: full precision is trained on as
many tokens of the text that QAT was trained on, and then quantized without training. *Against ...*: QAT's value minus the
other's on the same items, with the 95 % interval. Methods are chosen on one half of the windows and judged on the other
half of all items, both ways; where the halves choose otherwise than all windows, the brackets say so. **Worth it** is
about what lies beyond fine-tuned PTQ: yes, if QAT is better in a measure and worse in none, and against plain PTQ too; no, if
it is worse in one and better in none, or equivalent in all; mixed, if it is better in one and worse in another, or than
plain PTQ; undecided else; no control, if nothing fine-tuned on QAT's text was quantized. Of a training with one seed, how
much another would change is not in the intervals. *Equivalent*: the interval lies within the margin of the configuration.
*Better*, *worse*: p < 5 % after Holm's correction for the measures of a comparison, so that an interval may just leave
zero out and be *undecided*; after that, about how many windows or questions would decide, if the estimate stayed (where
seeds differ, with more of them too). *Time*, *memory*: QAT's as a multiple of PTQ's, to quantize once, each peak against
the other's of the same kind."""


def _difference(difference: Difference | None, measure: str) -> Entry:
    if difference is None:
        return Entry("")
    entry = _interval(difference.interval, {"kl": "kl_mean"}.get(measure, measure), difference.outcome)
    return replace(entry, detail=", ".join(part for part in (entry.detail, to_decide(difference)) if part))


def to_decide(difference: Difference) -> str:
    """How many items would decide, to two digits; empty if they do, or if no number would."""
    return f"about {float(f'{difference.needed:.2g}'):,.0f} {difference.items}" if difference.needed else ""


def main(cells: pd.DataFrame, model: str) -> Table | None:
    """Every cell: quality, size and cost in one line."""
    zero_shot = [task for found in cells["flips"] for task in found if not task.startswith("mmlu")]
    rows, partial = [], _partial(cells)
    flips = "flips lost, won" + (" †" if any(f"{task}/acc" in partial for task in zero_shot) else "")
    for cell in cells.to_dict("records"):
        row = name_columns(cell, cells)
        for metric, name, kind in _headlines(cells):
            if metric in cells:
                row[name + _dagger(partial, metric)] = _estimate(cell, metric, kind)
        if zero_shot:
            row[flips] = _flips(cell)
        row |= {"bits/weight": number(cell.get("bits_per_weight")), "size MB": number(cell.get("size_mb"))}
        if cells.get("kv_cache_bytes", pd.Series()).nunique() > 1:
            row["KV cache bytes"] = scaled(cell.get("kv_cache_bytes"), 1, "{:,.0f}")
        row["time min"] = scaled(cell.get("seconds"), 60, "{:.1f}")
        row["host GB"] = scaled(cell.get("host_memory_mb"), 1000, "{:.1f}")
        if "device_memory_mb" in cells and cells["device_memory_mb"].notna().any():
            row["device GB"] = scaled(cell["device_memory_mb"], 1000, "{:.1f}")
        tokens = cell.get("training_tokens", math.nan)
        row["training tokens"] = scaled(tokens, 1, "{:,.0f} " + cell["trained_on"])
        if cells["as_in_paper"].notna().any():
            row["settings"] = word({True: "paper", False: "ours"}.get(cell["as_in_paper"], ""))
        rows.append(row)
    return table(f"{model}-main", "All methods", rows, MAIN)


MAIN = """\
**Bold**: the best of a scheme (and seed) by that measure; ≈: not told apart from the best (95 % interval of the paired
difference). *KL*: divergence of the next-token distribution from full precision, nats per token. *Flips*: zero-shot
questions that full precision answered and the row did not, and the reverse. *Bits/weight*: what is stored of all matrices
in the decoder blocks, scales and zero points included; *size*: the checkpoint on disk, embeddings and head included.
*Time*: of quantizing, with that of the method it starts from, of generating its training text and of measuring which
layers need more bits. *Host*, *device*: the peaks of the last step's process in main memory and in the accelerator's,
where one was used. *Training tokens*: all that were trained on on the way to the row. *Settings*: *paper*, if grid and
algorithm are as the method's paper has them (learning rates belong to the budget and are not counted); *ours*, if they
are what was best on the tuning text."""


def against_reference(cells: pd.DataFrame, model: str) -> Table | None:
    """How each cell differs from full precision, item by item."""
    metrics = [m for m in _headlines(cells) if f"{m[0]}_against_reference" in cells and m[0] != "kl_mean"]
    rows, partial = [], _partial(cells)
    for cell in cells[cells["method"] != REFERENCE].to_dict("records"):
        row = name_columns(cell, cells)
        for metric, name, _ in metrics:
            row[name.removesuffix(" %") + _dagger(partial, metric)] = against(cell, metric, "reference")
        for metric, name, kind in DETAILS:
            if metric in cells:
                row[name + _dagger(partial, metric)] = _estimate(cell, metric, kind)
        rows.append(row)
    note = "Perplexity in percent of full precision's, accuracies in points, with the 95 % interval of the paired difference."
    return table(f"{model}-against-full-precision", "Against full precision", rows, note)


def against_ptq(cells: pd.DataFrame, model: str) -> Table | None:
    """Each QAT cell against the best PTQ of its scheme, and against that of a fine-tuned model, item by item."""
    rows, partial = [], _partial(cells)
    for cell in cells[(cells["rival"] != "") | (cells["control"] != "")].to_dict("records"):
        row = name_columns(cell, cells) | {"best PTQ": word(cell["rival"])}
        row |= _against(cell, cells, "ptq", "", partial)
        row["fine-tune, then PTQ"] = word(cell["control"] or "no control on this text")
        row |= _against(cell, cells, "control", " beyond it", partial)
        rows.append(row)
    return table(f"{model}-qat-against-ptq", "QAT against the best PTQ", rows, AGAINST_PTQ)


AGAINST_PTQ = """\
Change from the scheme's best PTQ, and from the best PTQ of a model that was fine-tuned on as many tokens of the same
text: what lies *beyond it* is the merit of quantization-aware training. In percent for perplexity, in points for
accuracies, with the 95 % interval of the paired difference. The best is that of the same items; only the verdict above is
free of that choice."""


def _against(cell: dict[str, Any], cells: pd.DataFrame, rival: str, suffix: str, partial: set[str]) -> dict[str, Entry]:
    """A column for each metric that some cell has a comparison with such a rival of."""
    columns = [(m, name.removesuffix(" %")) for m, name, _ in _headlines(cells) if f"{m}_against_{rival}" in cells]
    return {name + suffix + _dagger(partial, m): against(cell, m, rival) for m, name in columns}


def training(cells: pd.DataFrame, model: str) -> Table | None:
    """What was trained, and what that changed."""
    rows = []
    for cell in [cell for cell in cells.to_dict("records") if not math.isnan(cell.get("moved", math.nan))]:
        row = name_columns(cell, cells) | {"tokens": scaled(cell["training_tokens"], 1, "{:,.0f}")}
        row |= {"text": word(cell["trained_on"]), "trained %": scaled(cell["trained_share"], 0.01, "{:.1f}")}
        row |= {"moved %": scaled(cell["moved"], 0.01, "{:.0f}")}
        row |= {"codes changed %": scaled(cell["codes_changed"], 0.01, "{:.2f}")}
        rows.append(row)
    return table(f"{model}-training", "Training", rows, TRAINING)


TRAINING = """\
*Trained*: share of the model's parameters; *moved*: share of these that changed at all; *codes changed*: share of the integer
codes that are not those of the first step, which is what training did to the rounding."""


def tasks(cells: pd.DataFrame, model: str) -> Table | None:
    """The score of every task, and how answers flipped."""
    scores = {task: metric for found in cells["scores"] for task, metric in found.items()}
    rows, partial = [], _partial(cells)
    for cell in cells.to_dict("records"):
        if not any(metric in cell["metrics"] for metric in scores.values()):
            continue
        row = name_columns(cell, cells)
        for task, metric in scores.items():
            entry = _estimate(cell, metric, "share")
            if flip := cell["flips"].get(task):
                entry = Entry(entry.text, entry.value, f"({flip.worse}, {flip.better}){'!' if flip.p < 0.05 else ''}")
            row[task + _dagger(partial, metric)] = entry
        rows.append(row)
    return table(f"{model}-tasks", "Tasks", rows, TASKS)


TASKS = """\
Share of right answers in percent; in brackets the questions lost and won against full precision, `!` where so uneven a
change has a probability below 5 % by chance (McNemar's exact test, not corrected for the number of tasks)."""


def spread(cells: pd.DataFrame, model: str) -> Table | None:
    """Mean and standard deviation over seeds, where there are several."""
    rows, partial = [], _partial(cells)
    for (scheme, method), group in cells.groupby(["scheme", "method"], sort=False):
        if group["seed"].nunique() < 2:
            continue
        row = {"scheme": word(scheme), "method": word(method), "seeds": scaled(group["seed"].nunique(), 1, "{:.0f}")}
        for metric, name, kind in _headlines(cells):
            if metric in group and group[metric].notna().sum() > 1:
                average, deviation = seed_spread(group[metric].dropna().to_numpy())
                row[name + _dagger(partial, metric)] = Entry(_plus_minus(average, deviation, kind), average)
        rows.append(row)
    return table(f"{model}-seeds", "Spread over seeds", rows, "± here is the standard deviation over seeds.")


def _headlines(cells: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Those of HEADLINES to show: of the two zero-shot averages one."""
    return [h for h in HEADLINES if h[0] != ZERO_SHOT[1] or ZERO_SHOT[0] not in cells]


def name_columns(cell: dict[str, Any], cells: pd.DataFrame) -> dict[str, Entry]:
    """The columns that say which cell a row is."""
    start = f"(from {cell['init_from']})" if isinstance(cell.get("init_from"), str) and cell["init_from"] else ""
    star = " *" if cell["departures"] else ""
    row = {"scheme": word(cell["scheme"]), "method": Entry(cell["method"] + star, cell["method"], start)}
    return row | ({"seed": Entry(str(cell["seed"]), cell["seed"])} if cells["seed"].nunique() > 1 else {})


def word(text: str) -> Entry:
    return Entry(text, text)


def _method(rows: Side, halves: tuple[str, ...]) -> Entry:
    """The method of rows that differ in their seeds, their mean perplexity, and what the halves of the windows choose."""
    if not rows:
        return Entry("none")
    about = [significant(mean(rows, "perplexity"))] + ([f"{len(rows)} seeds"] if len(rows) > 1 else [])
    about += [f"halves choose {' and '.join(halves)}"] if halves else []
    return Entry(rows[0]["method"], rows[0]["method"], f"({', '.join(about)})")


def mean(rows: Side, column: str) -> float:
    """Over rows that differ in their seeds."""
    return sum(row[column] for row in rows) / len(rows)


def times(a: Answer, cost: str) -> float:
    """A cost of QAT as a multiple of PTQ's, means over seeds; NaN without one of them, or if PTQ's is nothing."""
    ptq = mean(a.ptq, cost) if a.ptq and a.qat else 0
    return mean(a.qat, cost) / ptq if ptq else math.nan


def _estimate(cell: dict[str, Any], metric: str, kind: str) -> Entry:
    """A value with its standard error, marked if it is the best of its scheme or not told apart from that."""
    if metric not in cell["metrics"]:
        return Entry("-" if cell["state"] == "done" else cell["state"])
    text, error = _plus_minus(cell[metric], cell[f"{metric}_stderr"], kind).partition(" ± ")[::2]
    mark = "best" if metric in cell["best"] else "tie" if metric in cell["ties"] else ""
    mark = "" if cell["unquantized"] else mark
    return Entry(text, cell[metric] * (100 if kind == "share" else 1), f"± {error}" if error else "", mark)


def _plus_minus(value: float, error: float | None, kind: str) -> str:
    """A value with its error, in percent for a share."""
    known = error is not None and not math.isnan(error) and error > 0
    if kind == "share":
        return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if known else "")
    return significant(value) + (f" ± {significant(error, 2)}" if known else "")


def _partial(cells: pd.DataFrame) -> set[str]:
    """The metrics of which some results are partial."""
    return {name for found in cells["metrics"] for name, entry in found.items() if entry["partial"]}


def _dagger(partial: set[str], metric: str) -> str:
    """The mark of a column with partial results."""
    return " †" if metric in partial else ""


def against(cell: dict[str, Any], metric: str, rival: str) -> Entry:
    interval = cell.get(f"{metric}_against_{rival}")
    if not isinstance(interval, Interval):
        return Entry("")
    return _interval(interval, metric, interval.verdict(higher_is_better=metric not in LOWER_IS_BETTER))


def _interval(interval: Interval, metric: str, verdict: str) -> Entry:
    """A paired comparison: the change and what is made of it in a word, and its interval."""
    if metric == "kl_mean":
        text, between = f"{interval.value:+.3f}", f"[{interval.low:+.3f}, {interval.high:+.3f}]"
    elif metric == "perplexity" and abs(interval.value) >= 10:
        text, between = f"{interval.value + 1:,.0f} x", ""
    else:
        digits = 0 if metric == "perplexity" and abs(interval.value) >= 1 else 1
        low, mid, high = (f"{100 * v:+.{digits}f}" for v in (interval.low, interval.value, interval.high))
        text, between = mid + (" %" if metric == "perplexity" else ""), f"[{low}, {high}]"
    return Entry(f"{text} {verdict}", interval.value * (1 if metric == "kl_mean" else 100), between)


def _flips(cell: dict[str, Any]) -> Entry:
    """Zero-shot questions that full precision answered and this cell did not, and the reverse."""
    found = [f for task, f in cell["flips"].items() if not task.startswith("mmlu")]
    lost, won = sum(f.worse for f in found), sum(f.better for f in found)
    return Entry(f"{lost}, {won}", lost, f"of {sum(f.n for f in found)}") if found else Entry("")


def number(value: float | None) -> Entry:
    known = value is not None and not math.isnan(value)
    return Entry(significant(value), value) if known else Entry("")


def scaled(value: float | None, unit: float, form: str) -> Entry:
    known = value is not None and not math.isnan(value)
    return Entry(form.format(value / unit), value / unit) if known else Entry("")


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, in powers of ten only if it is very large or very small."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if value >= 10**digits / 10 else f"{value:.{digits}g}"
