"""Quality against cost."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import QAT_AGAINST_PTQ, Place
from reports.figures._charts import Data, add, against_size, axis, cap, dots, order
from reports.tree import Results

PLACE = Place(QAT_AGAINST_PTQ)
COSTS = {
    "minutes": "time to quantize, minutes",
    "host": "peak host memory, GB",
    "device": "peak device memory, GB",
}


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """A row of panels for each scheme, a column for each cost."""
    points = against_size(cells, "perplexity")
    if len(points) < 2:
        return None
    cap(points, by="scheme")
    named, panels = add(data, points), []
    height = 200 if len(order(points, "scheme")) <= 4 else 110
    for column, title in COSTS.items():
        if all(point[column] is None for point in points):
            continue
        x = alt.X(f"{column}:Q", title=title, scale=alt.Scale(zero=False, nice=False, padding=15))
        y = alt.Y("drawn:Q", title="perplexity (lower is better)", scale=axis(log=True))
        panel = dots(alt.Chart(named), x, y, points, results.methods, selects=not panels).properties(
            width=260, height=height
        )
        row = alt.Facet("scheme:N", sort=order(points, "scheme"), title=None)
        panels.append(panel.facet(row, columns=1).resolve_scale(x="independent", y="independent"))
    return alt.hconcat(*panels)
