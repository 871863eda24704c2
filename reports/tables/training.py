"""Trained parameters of each cell that trained, and the effect on its integer codes."""

from __future__ import annotations

import math

from reports.cells import Cell
from reports.document import TRAINING, Place, Table
from reports.tables._entries import name_columns, scaled, table_of, word
from reports.tree import Results

PLACE = Place(TRAINING)
NOTE = """\
*Trained*: share of the model's parameters; *moved*: share of these that changed at all; *codes changed*: share of the
integer codes that are not those which the last step started from, which is what it did to the rounding; both of a
sample of each tensor. Where that is 0 the last step had an effect on scales alone, as PEQA has. *Learning rates*: the
largest of each schedule, of all steps of a recipe; relative to the scale or to the size of what is trained, but for
methods that train a layer's weights as they are, which have one for each layer."""


def table(cells: list[Cell], results: Results) -> Table | None:
    rows = []
    for cell in [cell for cell in cells if not math.isnan(cell.run.moved)]:
        run = cell.run
        row = name_columns(cell, cells) | {"tokens": scaled(run.training_tokens, 1, "{:,.0f}")}
        row |= {"text": word(run.training_text), "learning rates": word(run.rates)}
        row |= {"trained %": scaled(run.trained_share, 0.01, "{:.1f}"), "moved %": scaled(run.moved, 0.01, "{:.0f}")}
        row |= {"codes changed %": scaled(run.codes_changed, 0.01, "{:.2f}")}
        rows.append(row)
    return table_of(f"{cells[0].model}-training", TRAINING, rows, NOTE)
