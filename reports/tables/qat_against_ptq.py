"""Each QAT cell against the best PTQ of its scheme, and against that of a fine-tuned model, item by item."""

from __future__ import annotations

from reports.cells import CONTROL_PTQ, QUANTIZED, Cell
from reports.document import QAT_AGAINST_PTQ, Entry, Place, Table
from reports.metrics import headlines
from reports.tables._entries import against, changes, dagger, name_columns, partial_metrics, table_of, word
from reports.tree import Results

PLACE = Place(QAT_AGAINST_PTQ)
NOTE = """\
Change from the scheme's best PTQ, and from the best PTQ of a model that was fine-tuned on as much of the same texts:
what lies *beyond it* is the merit of quantization-aware training. In percent for perplexity, in points for
accuracies, with the 95 % interval of the paired difference. The best is chosen by the same items, by perplexity on
all texts; in the verdict above it is chosen by other windows. No interval is corrected for the number of rows."""


def table(cells: list[Cell], results: Results) -> Table | None:
    rows, partial = [], partial_metrics(cells)
    for cell in cells:
        rivals = results.comparisons[cell].rivals
        if not {"ptq", "control"} & rivals.keys():
            continue
        row = name_columns(cell, cells)
        row["best PTQ"] = word(rivals["ptq"].method if "ptq" in rivals else "")
        row |= _changes(cell, results, "ptq", "", partial)
        row[QUANTIZED[CONTROL_PTQ]] = word(
            rivals["control"].method if "control" in rivals else "no control on this text"
        )
        row |= _changes(cell, results, "control", " beyond it", partial)
        rows.append(row)
    return table_of(f"{cells[0].model}-qat-against-ptq", QAT_AGAINST_PTQ, rows, NOTE)


def _changes(cell: Cell, results: Results, rival: str, suffix: str, partial: set[str]) -> dict[str, Entry]:
    return {
        metric.heading + suffix + dagger(partial, metric.name): against(cell, metric, rival, results)
        for metric in changes(results, headlines(results.measured), rival)
    }
