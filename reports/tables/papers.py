"""The papers' numbers beside ours, where the matrix has a model and scheme of theirs.

`papers.csv` has what the papers' tables say, under this project's names of models, schemes, methods and tasks:
LR-QAT (arXiv 2406.06385, tables 4 and 5) and LLM-QAT (arXiv 2305.17888, the table of its authors' repository). Their
perplexity is of WikiText-2 in windows of `window` tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from reports.cells import Cell
from reports.document import PAPERS, Entry, Place, Table
from reports.metrics import REGISTER, significant
from reports.tree import Results

PLACE = Place(PAPERS, per_model=False)
FILE = Path(__file__).with_name("papers.csv")
NOTE = """\
Values as the papers print them: perplexity of WikiText-2, accuracies in percent. Theirs are of longer training, of an older
lm-eval, and of accuracies that may be normalized otherwise, as LLaMA's tables are; *measured* is with the largest training
budget, and empty where this matrix has no such row, or has it of other text, other windows or some of the questions."""
WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}


def table(cells: list[Cell], results: Results) -> Table | None:
    published = pd.read_csv(FILE)
    own = {(cell.model, cell.scheme) for cell in cells}
    published = published[[pair in own for pair in zip(published["model"], published["scheme"], strict=True)]]
    rows = []
    for theirs in published.to_dict("records"):
        names = [theirs[key] for key in ("model", "scheme", "method", "metric")]
        same = [c for c in cells if [c.model, c.scheme, c.method] == names[:3]]
        most = max((c.budget or 0 for c in same), default=0)
        values = [_measured(c, theirs, results) for c in same if (c.budget or 0) == most]
        values = [value for value in values if not math.isnan(value)]
        measured = sum(values) / len(values) if values else None
        row = [Entry(str(name), str(name)) for name in names]
        row += [Entry(f"{theirs['value']:g}", theirs["value"])]
        row += [Entry(significant(measured) if values else "", measured)]
        rows.append([*row, Entry(f"{theirs['paper']}, {theirs['where']}")])
    columns = ["model", "scheme", "method", "metric", "paper", "measured", "source"]
    return Table("papers", PAPERS, columns, rows, NOTE) if rows else None


def _measured(cell: Cell, theirs: dict[str, Any], results: Results) -> float:
    """The cell's value of a paper's number, in the paper's unit; NaN if it was not measured in a comparable way."""
    name = theirs["metric"]
    if name == "perplexity":
        measured = [cell.metrics[metric.name] for metric in REGISTER[name].everywhere(cell.metrics)]
        comparable = [
            m.value for m in measured if not m.partial and _is_theirs(results, m.evaluation, theirs["window"])
        ]
        return next(iter(comparable), math.nan)
    metric = name if name in cell.metrics else cell.scores.get(name)  # a task is there by its name
    return 100 * cell.value(metric) if metric and not cell.metrics[metric].partial else math.nan


def _is_theirs(results: Results, evaluation: str, window: float) -> bool:
    """Whether a perplexity is of WikiText-2 in such windows."""
    text = results.config["datasets"][results.config["evaluations"][evaluation]["dataset"]]
    whole = {key: value for key, value in text.items() if key not in ("column", "join", "revision")}
    return whole == WIKITEXT2 and results.matrix["evaluations"][evaluation]["window"] == window
