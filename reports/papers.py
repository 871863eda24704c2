"""The papers' numbers beside ours, where the matrix has a model and scheme of theirs.

`papers.csv` has what the papers' tables say, under this project's names of models, schemes, methods and tasks:
LR-QAT (arXiv 2406.06385, tables 4 and 5) and LLM-QAT (arXiv 2305.17888, the table of its authors' repository). Their
perplexity is of WikiText-2 in windows of `window` tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from reports.tables import Entry, Table, significant

FILE = Path(__file__).with_name("papers.csv")

NOTE = """\
Values as the papers print them: perplexity of WikiText-2, accuracies in percent. Theirs are of longer training and of an
older lm-eval; *measured* is empty where this matrix has no such row, or has perplexity of other text or windows."""


def papers(cells: pd.DataFrame, matrix: dict[str, Any]) -> Table | None:
    """A row per number of a paper for a model and scheme of the matrix, beside what was measured here."""
    published = pd.read_csv(FILE)
    have = set(zip(cells["model"], cells["scheme"], strict=True))
    published = published[[pair in have for pair in zip(published["model"], published["scheme"], strict=True)]]
    rows = []
    for number in published.to_dict("records"):
        mine = [
            cell
            for cell in cells.to_dict("records")
            if all(cell[key] == number[key] for key in ("model", "scheme", "method"))
        ]
        values = [value for cell in mine if (value := _measured(cell, number, matrix)) is not None]
        measured = sum(values) / len(values) if values else None
        theirs = significant(number["value"])
        row = [Entry(str(number[key]), str(number[key])) for key in ("model", "scheme", "method", "metric")]
        row += [Entry(theirs, number["value"]), Entry(significant(measured) if values else "", measured)]
        rows.append([*row, Entry(f"{number['paper']}, {number['where']}")])
    columns = ["model", "scheme", "method", "metric", "paper", "measured", "source"]
    return Table("papers", "Beside the papers", columns, rows, NOTE) if rows else None


def _measured(cell: dict[str, Any], number: dict[str, Any], matrix: dict[str, Any]) -> float | None:
    """The cell's value of a paper's number, in the paper's unit; None if it was not measured in a comparable way."""
    name = number["metric"]
    if name == "perplexity":
        if "perplexity" not in cell["metrics"] or cell["metrics"]["perplexity"]["partial"]:
            return None
        text = matrix["config"]["datasets"][matrix["config"]["evaluations"]["perplexity"]["dataset"]]
        whole = {k: v for k, v in text.items() if k not in ("column", "join", "revision")}
        wikitext2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}
        same = whole == wikitext2 and matrix["evaluations"]["perplexity"]["window"] == number["window"]
        return cell["perplexity"] if same else None
    metric = name if name in cell["metrics"] else cell["scores"].get(name)
    return 100 * cell[metric] if metric in cell["metrics"] else None
