"""Scaling factor gamma."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import GAMMA, Place
from reports.figures._charts import COLORS, NEUTRAL, Data, add, order, tips
from reports.tree import Results

PLACE = Place(GAMMA)
CLAIM = 6  # percent of perplexity, in arXiv 2411.06084


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """Perplexity over gamma, a panel for each scheme; a dotted line is the same method with a gamma for each group."""
    reference = next((c.value("perplexity") for c in cells if c.is_reference and "perplexity" in c.metrics), None)
    points = [
        {
            "scheme": cell.scheme,
            "module": cell.module,
            "gamma": _gamma(cell),
            "change": 100 * (cell.value("perplexity") / reference - 1),
        }
        for cell in cells
        if reference and _gamma(cell) is not None and "perplexity" in cell.metrics and cell.quantized
    ]
    fixed = [p for p in points if p["gamma"] != "search"]
    if len({p["gamma"] for p in fixed}) < 3:
        return None
    searched = [p | {"gamma": None} for p in points if p["gamma"] == "search"]
    x = alt.X("gamma:Q", title="gamma", scale=alt.Scale(zero=False, padding=10))
    y = alt.Y("change:Q", title="perplexity above full precision, %", scale=alt.Scale(type="symlog", constant=5))
    colors = alt.Scale(domain=order(points, "module"), range=list(COLORS))
    color = alt.Color("module:N", title="method", scale=colors)
    tooltip = tips("module:N", "scheme:N", "gamma:N", alt.Tooltip("change:Q", format=".2f"))
    base = alt.Chart(add(data, fixed + searched))
    line = base.transform_filter("datum.gamma !== null").mark_line(point=True)
    line = line.encode(x=x, y=y, color=color, tooltip=tooltip)
    search = base.transform_filter("datum.gamma === null").mark_rule(strokeDash=[2, 3], size=2)
    search = search.encode(y=y, color=color, tooltip=tooltip)
    claim = base.mark_rule(color=NEUTRAL, strokeDash=[6, 4]).encode(y=alt.datum(CLAIM))
    layered = alt.layer(claim, search, line).properties(width=240, height=220)
    facet = alt.Facet("scheme:N", sort=order(points, "scheme"), title=None)
    return layered.facet(facet, columns=3).resolve_scale(y="independent")


def _gamma(cell: Cell) -> float | str | None:
    """The factor of the min-max scale, or "search"; None for a method that has none."""
    return "search" if "gamma" in cell.options and cell.options.get("scale") == "search" else cell.options.get("gamma")
