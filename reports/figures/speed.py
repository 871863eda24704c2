"""Speed."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np

from reports.cells import Cell
from reports.document import SPEED, Place
from reports.figures._charts import COLORS, Data, add, order, tips
from reports.metrics import LLAMA_CPP
from reports.tree import Results

PLACE = Place(SPEED)


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """Decoded tokens per second by batch size: each scheme's kernels beside 16 and 32 bits. Ends of a line: middle half.

    Over all repeats of all cells: 16 and 32 bits were timed beside each of them, and methods of a scheme share its kernels.
    """
    points = []
    for (weights, batch), rates in _rates(cells).items():
        low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75)).round(2).tolist()
        points.append({"weights": weights, "batch": batch, "rate": middle, "low": low, "high": high})
    if not points:
        return None
    base = alt.Chart(add(data, points))
    y = alt.Y("weights:N", title=None, sort=order(points, "weights"), axis=alt.Axis(labelLimit=260))
    color = alt.Color("weights:N", title=None, legend=None, scale=alt.Scale(range=list(COLORS)))
    tooltip = tips("weights:N", "batch:Q", "rate:Q", "low:Q", "high:Q")
    x = alt.X("rate:Q", title="decoded tokens per second")
    bars = base.mark_bar().encode(x=x, y=y, color=color, tooltip=tooltip)
    spread = base.mark_rule(color="black", size=2).encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"), y=y)
    layered = alt.layer(bars, spread).properties(width=210, height=alt.Step(20))
    facet = alt.Facet("batch:O", title="batch size")
    return layered.facet(facet, columns=3).resolve_scale(x="independent")


def _rates(cells: Sequence[Cell]) -> dict[tuple[str, int], list[float]]:
    """Tokens per second of each repeat of decoding, by weights and batch size."""
    rates: dict[tuple[str, int], list[float]] = {}
    for cell in [cell for cell in cells if cell.speed]:
        names = {"bfloat16": "bf16", "float32": "fp32", "packed": f"{cell.scheme} ({cell.speed.kernel})"}
        names[LLAMA_CPP] = f"{cell.scheme} ({LLAMA_CPP}, {cell.speed.llama_cpp})"
        for t in cell.speed.timings:
            if t["phase"] == "decode":
                rates.setdefault((names[t["weights"]], t["batch"]), []).append(t["tokens"] / t["seconds"])
    return rates
