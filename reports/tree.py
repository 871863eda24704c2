"""A result tree as the report sees it: its matrix, its cells compared with each other, and the answers that they give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from reports.answer import EQUIVALENCE, Answer, answers
from reports.cells import Cell, read_cells, read_matrix
from reports.comparisons import Comparisons, compare_cells
from reports.crossing import Crossings, crossings
from reports.metrics import FACTS
from reports.statistics import Interval


@dataclass(frozen=True, eq=False)
class Results:
    """`path`: of its matrix.json. `comparisons`: of each cell with the others."""

    matrix: dict[str, Any]
    cells: list[Cell]
    comparisons: dict[Cell, Comparisons]
    path: Path

    @property
    def config(self) -> dict[str, Any]:
        return self.matrix["config"]

    @cached_property
    def answers(self) -> list[Answer]:
        return answers(self.cells, self.config.get("equivalence", EQUIVALENCE))

    @cached_property
    def crossings(self) -> dict[tuple[str, str], Crossings]:
        return crossings(self.cells)

    @cached_property
    def measured(self) -> set[str]:
        """The metrics that some cell has."""
        return {metric for cell in self.cells for metric in cell.metrics}

    @cached_property
    def compared(self) -> set[tuple[str, str]]:
        """The metrics that some cell has a comparison in, each with the rival."""
        return {key for comparisons in self.comparisons.values() for key in comparisons.changes}

    @property
    def methods(self) -> list[str]:
        """Names in the order that gives each its color: those that quantize first. The reference is drawn as a line."""
        cells = sorted(self.cells, key=lambda cell: not cell.quantized)
        return list(dict.fromkeys(cell.method for cell in cells if not cell.is_reference))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    def change(self, cell: Cell, metric: str, rival: str) -> Interval | None:
        """The change of a cell's metric from a rival's, see Comparisons; None without one."""
        return self.comparisons[cell].changes.get((metric, rival))

    def of(self, model: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.model == model]


def read_results(path: Path) -> Results:
    """The results of a matrix.json. ValueError for another file, or if two results of one protocol are of other items."""
    matrix = read_matrix(path)
    cells = read_cells(matrix, path.parent)
    return Results(matrix, cells, compare_cells(cells), path)


def tidy(results: Results) -> pd.DataFrame:
    """Every number of every cell in a row of its own, for a spreadsheet, a data frame or `reports.regression`."""
    rows = []
    for cell in results.cells:
        key = {name: getattr(cell, name) for name in ("model", "scheme", "method", "seed", "state")}
        key["budget"] = cell.budget or 0  # a number in every row, so that it can be a key
        for metric, entry in cell.metrics.items():
            row = key | {"evaluation": entry.evaluation, "metric": metric}
            row |= {name: getattr(entry, name) for name in ("value", "stderr", "unit", "higher_is_better")}
            row |= {"protocol": entry.protocol, "partial": entry.partial}
            if interval := results.change(cell, metric, "reference"):
                row |= {"change": interval.value, "change_low": interval.low, "change_high": interval.high}
            rows.append(row)
        for fact in FACTS:
            if not math.isnan(value := cell.value(fact.name)):
                row = key | {"evaluation": "run", "metric": fact.name, "value": float(value), "stderr": None}
                row |= {"unit": fact.unit, "higher_is_better": fact.higher_is_better, "protocol": "", "partial": False}
                rows.append(row)
        if not cell.metrics:
            rows.append(key)
    columns = [
        "model",
        "scheme",
        "method",
        "seed",
        "budget",
        "state",
        "evaluation",
        "metric",
        "value",
        "stderr",
        "unit",
    ]
    columns += ["higher_is_better", "protocol", "partial", "change", "change_low", "change_high"]
    return pd.DataFrame(rows, columns=columns).astype({"value": float, "stderr": float})
