"""Mean and standard deviation over seeds, where there are several."""

from __future__ import annotations

import numpy as np

from reports.cells import Cell, several_budgets
from reports.document import SEEDS, Entry, Place, Table
from reports.metrics import headlines
from reports.statistics import seed_spread
from reports.tables._entries import dagger, partial_metrics, plus_minus, scaled, table_of, tokens, word
from reports.tree import Results

PLACE = Place(SEEDS)
NOTE = "± here is the standard deviation over seeds."


def table(cells: list[Cell], results: Results) -> Table | None:
    groups: dict[tuple[str, str, int | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.scheme, cell.method, cell.budget), []).append(cell)
    rows, partial = [], partial_metrics(cells)
    for (scheme, method, budget), replicates in groups.items():
        seeds = len({cell.seed for cell in replicates if cell.metrics})
        if seeds < 2:
            continue
        row = {"scheme": word(scheme), "method": word(method)}
        row |= {"budget": tokens(budget)} if several_budgets(cells) else {}
        row["seeds"] = scaled(seeds, 1, "{:.0f}")
        for metric in headlines(results.measured):
            values = np.array([cell.value(metric.name) for cell in replicates])
            values = values[~np.isnan(values)]
            if len(values) > 1:
                average, deviation = seed_spread(values)
                text = plus_minus(average, deviation, metric.share)
                row[metric.column_heading + dagger(partial, metric.name)] = Entry(text, average)
        rows.append(row)
    return table_of(f"{cells[0].model}-seeds", SEEDS, rows, NOTE)
