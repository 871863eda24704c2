"""Each cell whose layers differ in their bits, against the same method at the same size with the same bits for all."""

from __future__ import annotations

from collections import Counter

from reports.answer import MEASURES
from reports.cells import Cell
from reports.document import MIXED_PRECISION, Entry, Place, Table
from reports.tables._entries import against, changes, name_columns, number, table_of, word
from reports.tree import Results

PLACE = Place(MIXED_PRECISION)
NOTE = """\
Change from *uniform*: the same method with the same number of bits for every layer, at the same stored size (within 1 %,
scales included). Perplexity in percent, KL in nats, accuracy in points, with the 95 % interval of the paired difference.
The bits come from calibration text, for methods too that see none themselves; the time that took is part of each cell's."""


def table(cells: list[Cell], results: Results) -> Table | None:
    rows = []
    for cell in [cell for cell in cells if cell.mixed]:
        layers = Counter(cell.bits.values())
        uniform = results.comparisons[cell].rivals.get("uniform")
        row = name_columns(cell, cells) | {"bits/weight": number(cell.value("bits_per_weight"))}
        row["layers by bits"] = Entry(", ".join(f"{bits}: {layers[bits]}" for bits in sorted(layers)))
        row["uniform"] = word(uniform.scheme) if uniform else Entry("none of this size")
        for measure in MEASURES.values():
            for metric in changes(results, measure.metric.everywhere(results.measured), "uniform"):
                row[metric.heading] = against(cell, metric, "uniform", results)
        rows.append(row)
    return table_of(f"{cells[0].model}-mixed", MIXED_PRECISION, rows, NOTE)
