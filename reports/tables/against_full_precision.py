"""How each cell differs from full precision, item by item."""

from __future__ import annotations

from reports.cells import Cell
from reports.document import AGAINST_FULL_PRECISION, Place, Table
from reports.metrics import details, headlines
from reports.tables._entries import against, changes, dagger, estimate, name_columns, partial_metrics, table_of
from reports.tree import Results

PLACE = Place(AGAINST_FULL_PRECISION)
NOTE = (
    "Perplexity in percent of full precision's, accuracies in points, with the 95 % interval of the paired difference."
)


def table(cells: list[Cell], results: Results) -> Table | None:
    # A divergence is one from full precision already.
    metrics = [m for m in changes(results, headlines(results.measured), "reference") if not m.divergence]
    partial = partial_metrics(cells)
    rows = []
    for cell in [cell for cell in cells if not cell.is_reference]:
        row = name_columns(cell, cells)
        for metric in metrics:
            row[metric.heading + dagger(partial, metric.name)] = against(cell, metric, "reference", results)
        for metric in details(results.measured):
            row[metric.column_heading + dagger(partial, metric.name)] = estimate(cell, metric, results)
        rows.append(row)
    name = f"{cells[0].model}-against-full-precision"
    return table_of(name, AGAINST_FULL_PRECISION, rows, NOTE)
