"""Flips."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import AGAINST_FULL_PRECISION, Place
from reports.figures._charts import Data, add, color, label, opacity, order, selection, tips
from reports.tree import Results

PLACE = Place(AGAINST_FULL_PRECISION)


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """Questions lost and won against full precision, a panel for each scheme."""
    points = []
    for cell in cells:
        flips = results.comparisons[cell].task_flips
        if not flips:
            continue
        about = {"scheme": cell.scheme, "method": cell.method, "seed": cell.seed, "row": label(cell, cells)}
        about["asked"] = sum(f.n for f in flips)
        points.append(about | {"change": "lost", "questions": -sum(f.worse for f in flips)})
        points.append(about | {"change": "won", "questions": sum(f.better for f in flips)})
    if not points:
        return None
    bars = alt.Chart(add(data, points)).mark_bar()
    bars = bars.encode(
        x=alt.X("questions:Q", title="questions lost (left), won (right)", axis=alt.Axis(format="d")),
        y=alt.Y("row:N", title=None, sort=order(points, "row"), axis=alt.Axis(labelLimit=260)),
        yOffset="seed:N",
        color=color(points, results.methods),
        opacity=opacity(),
        tooltip=tips("row:N", "scheme:N", "seed:N", "change:N", "questions:Q", "asked:Q"),
    )
    bars = bars.properties(width=240, height=alt.Step(18)).add_params(selection())
    facet = alt.Facet("scheme:N", sort=order(points, "scheme"), title=None)
    return bars.facet(facet, columns=3).resolve_scale(y="independent")
