"""Training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import TRAINING, Place
from reports.figures._charts import Data, add, color, dash, finite, opacity, order, selection, tips
from reports.tree import Results

PLACE = Place(TRAINING)
LONGEST = 100  # points of a curve
LINES = alt.Legend(symbolType="stroke", symbolSize=400)


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """The loss of each cell that trained, a panel for each scheme; a point of a long curve is the mean of several steps."""
    curves = []
    for cell in [cell for cell in cells if cell.run.losses]:
        losses = cell.run.losses
        every = math.ceil(len(losses) / LONGEST)
        parts = [losses[i : i + every] for i in range(0, len(losses), every)]
        curve = {"scheme": cell.scheme, "method": cell.method, "seed": cell.seed, "budget": cell.budget}
        curve["loss"] = [finite(sum(part) / len(part)) for part in parts]
        curves.append(curve | {"step": [min((i + 1) * every, len(losses)) for i in range(len(parts))]})
    if not curves:
        return None
    base = alt.Chart(add(data, curves)).transform_flatten(["step", "loss"])
    few = max(len(curve["step"]) for curve in curves) <= 32
    lines = base.mark_line(point=alt.OverlayMarkDef(size=20) if few else False).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("loss:Q", title="training loss, nats per token", scale=alt.Scale(zero=False)),
        color=color(curves, results.methods, LINES),
        detail=[alt.Detail("seed:N"), alt.Detail("budget:N")],
        strokeDash=dash(curves, results.methods, LINES),
        opacity=opacity(),
        tooltip=tips("method:N", "scheme:N", "budget:Q", "seed:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")),
    )
    panel = lines.properties(width=240, height=200).add_params(selection())
    return panel.facet(alt.Facet("scheme:N", sort=order(curves, "scheme"), title=None), columns=3)
