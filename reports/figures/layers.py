"""Layers."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import LAYERS, Place
from reports.figures._charts import Data, Points, add, block_and_layer, finite, label, order, tips
from reports.tree import Results

PLACE = Place(LAYERS)
MANY = 40  # cells, more than which cannot be looked at


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """Blocks from left to right, cells from top to bottom, a panel for each kind of layer."""
    first = min((cell.seed for cell in cells), default=0)
    points = _points([cell for cell in cells if cell.seed == first and cell.run.layers])
    if not points:
        return None
    tiles = alt.Chart(add(data, points)).transform_flatten(["block", "error"]).mark_rect()
    tiles = tiles.encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("cell:N", title=None, sort=order(points, "cell"), axis=alt.Axis(labelLimit=260)),
        color=alt.Color("error:Q", title="relative error", scale=alt.Scale(scheme="viridis", type="log")),
        tooltip=tips("cell:N", "layer:N", "block:O", "error:Q"),
    )
    blocks, rows = max(len(p["block"]) for p in points), len(order(points, "cell"))
    tiles = tiles.properties(width=max(110, 5 * blocks), height=max(40, 14 * rows))
    return tiles.facet(alt.Facet("layer:N", sort=order(points, "layer"), title=None), columns=4)


def _points(cells: Sequence[Cell]) -> Points:
    """One for each cell and kind of layer: one for each layer would make the page of a large matrix megabytes longer."""
    points: dict[tuple[str, str], dict] = {}
    for cell in _few(cells):
        for layer in cell.run.layers:
            block, kind = block_and_layer(layer.name)
            name = f"{cell.scheme} {label(cell, cells)}"
            point = points.setdefault((name, kind), {"cell": name, "layer": kind, "block": [], "error": []})
            point["block"].append(block)
            point["error"].append(finite(layer.weight_error))
    return list(points.values())


def _few(cells: Sequence[Cell]) -> Sequence[Cell]:
    """All cells, or, of more than can be looked at, the best of each kind and scheme."""
    if len(cells) <= MANY:
        return cells
    best: dict[tuple[str, str], Cell] = {}
    for cell in [cell for cell in cells if "perplexity" in cell.metrics]:
        key = cell.scheme, cell.kind
        if key not in best or cell.value("perplexity") < best[key].value("perplexity"):
            best[key] = cell
    return [cell for cell in cells if any(cell is chosen for chosen in best.values())]
