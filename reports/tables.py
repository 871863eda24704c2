"""The report's tables, as data: what each entry says, what it is worth for sorting, and whether it is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from evals.core.statistics import Interval, seed_spread
from reports.answer import ZERO_SHOT, Answer
from reports.results import REFERENCE, trained

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
    """For each model and scheme the best PTQ, the best QAT, what parts them and what it costs."""
    rows = []
    for a in answers:
        row = {"model": word(a.model), "scheme": word(a.scheme), "bits/weight": number(a.bits_per_weight)}
        row["QAT worth it"] = Entry(a.verdict or "-", a.verdict, mark="best" if a.verdict == "yes" else "")
        for name, side in (("best PTQ", a.ptq), ("best QAT", a.qat)):
            row[name] = _method(side)
        row["change"] = _interval(a.perplexity, "perplexity")
        row["beyond training text"] = _interval(a.net, "perplexity") if a.net else Entry("no control" if a.qat else "")
        row["KL"] = _interval(a.kl, "kl_mean")
        row["zero-shot %"] = _interval(a.zero_shot, ZERO_SHOT[0])
        both = bool(a.ptq and a.qat)
        row["time"] = scaled(times(a, "seconds"), 1, "{:.1f} x") if both else Entry("")
        row["memory"] = scaled(times(a, "memory_mb"), 1, "{:.1f} x") if both else Entry("")
        tokens = a.qat[0]["training_tokens"] if a.qat else math.nan
        row["training tokens"] = scaled(tokens, 1, "{:,.0f}")
        rows.append(row)
    return table("answer", "Is QAT worth it?", rows, ANSWER)


ANSWER = """\
The best method of each kind by perplexity, which is in brackets. *Change*, *KL*, *zero-shot*: QAT's minus PTQ's on the same
items, with the 95 % interval and what it says. *Beyond training text*: the change that is left when what full precision gains
by training on the same tokens (the control) is taken off. *Time*, *memory*: QAT's as a multiple of PTQ's, to quantize once.
**Worth it**: yes, if QAT is better in perplexity beyond the training text, KL or zero-shot and worse in none; no, if worse in
one and better in none; tie, if nothing tells the two apart; mixed, if the measures disagree. The intervals are of the items:
how much another seed of the training would change, or that the best was chosen on the same items, is not in them."""


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
        row["memory GB"] = scaled(cell.get("memory_mb"), 1000, "{:.1f}")
        tokens = cell.get("training_tokens", math.nan)
        row["training tokens"] = Entry(f"{tokens:,.0f} {cell['trained_on']}", tokens) if trained(cell) else Entry("")
        rows.append(row)
    return table(f"{model}-main", "All methods", rows, MAIN)


MAIN = """\
**Bold**: the best of a scheme (and seed) by that measure; ≈: not told apart from the best (95 % interval of the paired
difference). *KL*: divergence of the next-token distribution from full precision, nats per token. *Flips*: zero-shot questions
that full precision answered and the row did not, and the reverse. *Bits/weight*: codes, scales and zero points of quantized
layers; *size*: the checkpoint on disk, embeddings and head included. *Time*: of quantizing, with that of the method it starts
from, of generating its training text and of measuring which layers need more bits. *Memory*: the process's peak, or the GPU's
where one was used."""


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
    """Each cell that was trained against the best of its scheme that was not, item by item."""
    columns = [(m, name) for m, name, _ in _headlines(cells) if f"{m}_against_ptq" in cells]
    rows, partial = [], _partial(cells)
    for cell in cells[cells["rival"] != ""].to_dict("records"):
        row = name_columns(cell, cells) | {"best PTQ": word(cell["rival"])}
        row |= {name.removesuffix(" %") + _dagger(partial, m): against(cell, m, "ptq") for m, name in columns}
        rows.append(row)
    note = (
        "Change from the scheme's best method that does not train, in percent for perplexity, in points for accuracies."
    )
    return table(f"{model}-qat-against-ptq", "QAT against the best PTQ", rows, note)


def training(cells: pd.DataFrame, model: str) -> Table | None:
    """What was trained, and what that changed."""
    rows = []
    for cell in [cell for cell in cells.to_dict("records") if trained(cell)]:
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


def _method(rows: list[dict[str, Any]]) -> Entry:
    """The method of rows that differ in their seeds, and their mean perplexity."""
    if not rows:
        return Entry("not run")
    seeds = f", {len(rows)} seeds" if len(rows) > 1 else ""
    return Entry(rows[0]["method"], rows[0]["method"], f"({significant(mean(rows, 'perplexity'))}{seeds})")


def mean(rows: list[dict[str, Any]], column: str) -> float:
    """Over rows that differ in their seeds."""
    return sum(row[column] for row in rows) / len(rows)


def times(a: Answer, cost: str) -> float:
    """A cost of QAT as a multiple of PTQ's, means over seeds; NaN if that is nothing."""
    ptq = mean(a.ptq, cost)
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
    return _interval(cell.get(f"{metric}_against_{rival}"), metric)


def _interval(interval: Interval | None, metric: str) -> Entry:
    """A paired comparison: the verdict's sign in words, the change and its interval."""
    if not isinstance(interval, Interval):
        return Entry("")
    verdict = interval.verdict(higher_is_better=metric not in LOWER_IS_BETTER)
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
