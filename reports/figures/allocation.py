"""Mixed precision."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import MIXED_PRECISION, Place
from reports.figures._charts import Data, add, block_and_layer, order, tips
from reports.tree import Results

PLACE = Place(MIXED_PRECISION)


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """Bits of each layer, a panel for each scheme whose layers differ; all methods of a scheme have the same."""
    schemes = {cell.scheme: cell.bits for cell in cells if cell.mixed}
    points = []
    for scheme, layers in schemes.items():
        for name, bits in layers.items():
            block, layer = block_and_layer(name)
            points.append({"scheme": scheme, "block": block, "layer": layer, "bits": bits})
    if not points:
        return None
    widths = sorted({p["bits"] for p in points})
    colors = alt.Scale(domain=widths, scheme="viridis")
    tiles = alt.Chart(add(data, points)).mark_rect(stroke="white", strokeWidth=0.5)
    tiles = tiles.encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("layer:N", title=None, sort=order(points, "layer"), axis=alt.Axis(labelLimit=260)),
        color=alt.Color("bits:O", title="bits", scale=colors),
        tooltip=tips("scheme:N", "layer:N", "block:O", "bits:O"),
    )
    blocks = len(order(points, "block"))
    tiles = tiles.properties(width=max(110, 12 * blocks), height=16 * len(order(points, "layer")))
    return tiles.facet(alt.Facet("scheme:N", sort=order(points, "scheme"), title=None), columns=2)
