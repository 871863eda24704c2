"""The score of every task, and how answers flipped."""

from __future__ import annotations

from reports.cells import Cell
from reports.document import TASKS, Entry, Place, Table
from reports.metrics import Metric
from reports.tables._entries import dagger, estimate, name_columns, partial_metrics, table_of
from reports.tree import Results

PLACE = Place(TASKS)
NOTE = """\
Share of right answers in percent; in brackets the questions lost and won against full precision, `!` where a change
this uneven has a probability below 5 % by chance (McNemar's exact test, not corrected for the number of tasks)."""


def table(cells: list[Cell], results: Results) -> Table | None:
    scores = {task: metric for cell in cells for task, metric in cell.scores.items()}
    rows, partial = [], partial_metrics(cells)
    for cell in cells:
        if not any(metric in cell.metrics for metric in scores.values()):
            continue
        row = name_columns(cell, cells)
        for task, metric in scores.items():
            entry = estimate(cell, Metric(metric, share=True), results)
            if flip := results.comparisons[cell].flips.get(metric):
                entry = Entry(entry.text, entry.value, f"({flip.worse}, {flip.better}){'!' if flip.p < 0.05 else ''}")
            row[task + dagger(partial, metric)] = entry
        rows.append(row)
    return table_of(f"{cells[0].model}-tasks", TASKS, rows, NOTE)
