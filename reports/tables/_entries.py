"""Entries of tables: values with their errors, changes with their intervals, and the columns that name a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable

from reports.cells import Cell, several_budgets
from reports.document import Entry, Table
from reports.metrics import Metric, significant
from reports.statistics import Interval
from reports.tree import Results


def table_of(name: str, title: str, rows: list[dict[str, Entry]], note: str = "") -> Table | None:
    """A table of rows that may lack some of the columns; None if there are no rows."""
    if not rows:
        return None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(name, title, columns, [[row.get(c, Entry("")) for c in columns] for row in rows], note)


def name_columns(cell: Cell, cells: Iterable[Cell]) -> dict[str, Entry]:
    """The columns that say which cell a row is; its budget and its seed where the table's cells differ in them."""
    start = f"(from {cell.run.start})" if cell.run.start else ""
    star = " *" if cell.departures else ""
    row = {"scheme": word(cell.scheme), "method": Entry(cell.method + star, cell.method, start)}
    if several_budgets(cells):
        row["budget"] = tokens(cell.budget)
    if len({c.seed for c in cells}) > 1:
        row["seed"] = Entry(str(cell.seed), cell.seed)
    return row


def tokens(budget: int | None) -> Entry:
    """A training budget; empty where nothing is trained."""
    return Entry(f"{budget:,}", budget) if budget else Entry("")


def word(text: str) -> Entry:
    return Entry(text, text)


def number(value: float) -> Entry:
    """A value with four significant digits; empty for NaN."""
    return Entry("") if math.isnan(value) else Entry(significant(value), value)


def scaled(value: float, unit: float, form: str) -> Entry:
    """A value in a unit, as a format string writes it; empty for NaN."""
    return Entry("") if math.isnan(value) else Entry(form.format(value / unit), value / unit)


def estimate(cell: Cell, metric: Metric, results: Results) -> Entry:
    """A value with its standard error, marked if it is the best of its scheme or not told apart from that."""
    if metric.name not in cell.metrics:
        return Entry("-" if cell.state == "done" else cell.state)
    measured = cell.metrics[metric.name]
    text, error = plus_minus(measured.value, measured.stderr, metric.share).partition(" ± ")[::2]
    compared = results.comparisons[cell]
    mark = "best" if metric.name in compared.best else "tie" if metric.name in compared.ties else ""
    value = measured.value * (100 if metric.share else 1)
    return Entry(text, value, f"± {error}" if error else "", mark if cell.quantized else "")


def plus_minus(value: float, error: float | None, share: bool) -> str:
    """A value with its error, in percent for a share."""
    known = error is not None and not math.isnan(error) and error > 0
    if share:
        return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if known else "")
    return significant(value) + (f" ± {significant(error, 2)}" if known else "")


def partial_metrics(cells: Iterable[Cell]) -> set[str]:
    """The metrics of which some results are partial."""
    return {name for cell in cells for name, entry in cell.metrics.items() if entry.partial}


def dagger(partial: set[str], metric: str) -> str:
    """The mark of a column with partial results."""
    return " †" if metric in partial else ""


def against(cell: Cell, metric: Metric, rival: str, results: Results) -> Entry:
    """The change of a metric from a rival's; empty without one."""
    interval = results.change(cell, metric.name, rival)
    if interval is None:
        return Entry("")
    return change(interval, metric, interval.verdict(metric.higher_is_better))


def changes(results: Results, metrics: Iterable[Metric], rival: str) -> list[Metric]:
    """Those of the metrics in which some cell of the report has a comparison with such a rival: a column for each."""
    return [metric for metric in metrics if (metric.name, rival) in results.compared]


def change(interval: Interval, metric: Metric, verdict: str) -> Entry:
    """A paired comparison: the change, its verdict in a word, and its interval."""
    how, size = metric.change, abs(interval.value)
    if how.relative and size >= 10:
        text, between = f"{interval.value + 1:,.0f} x", ""
    else:
        digits = 0 if how.relative and size >= 1 else how.digits
        low, middle, high = (f"{how.factor * v:+z.{digits}f}" for v in (interval.low, interval.value, interval.high))
        text, between = middle + (how.unit if how.relative else ""), f"[{low}, {high}]"
    return Entry(f"{text} {verdict}", interval.value * how.factor, between)
