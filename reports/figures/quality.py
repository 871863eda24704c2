"""Quality against size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import altair as alt

from reports.cells import Cell
from reports.document import ALL_METHODS, Place
from reports.figures._charts import NEUTRAL, Data, Points, add, against_size, axis, cap, color, dots, opacity, tips
from reports.metrics import DRAWN, Metric
from reports.tree import Results

PLACE = Place(ALL_METHODS)


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """A panel for each metric, with its Pareto front and full precision as lines."""
    panels: list[alt.TopLevelMixin] = []
    for metric in DRAWN:
        points = against_size(cells, metric.name)
        if not metric.share:  # a log scale has neither zero nor an error bar that reaches it
            points = [p | {"low": max(p["low"], p["value"] / 10)} for p in points if p["value"] > 0]
            cap(points, by="bits", together=True)
        if len(points) >= 2:
            panels.append(_panel(metric, points, cells, results.methods, data, selects=not panels))
    return alt.hconcat(*panels) if panels else None


def _panel(
    metric: Metric, points: Points, cells: Sequence[Cell], methods: Sequence[str], data: Data, selects: bool
) -> alt.TopLevelMixin:
    measured = [cell.metrics[metric.name] for cell in cells if metric.name in cell.metrics]
    _dodge(points)
    label = f"{metric.axis} ({'higher' if metric.higher_is_better else 'lower'} is better)"
    dagger = " †" if any(entry.partial for entry in measured) else ""
    x = alt.X(
        "position:Q", title="bits per weight, scales included", scale=alt.Scale(zero=False, nice=False, padding=20)
    )
    place = "value" if metric.share else "drawn"
    y = alt.Y(f"{place}:Q", title=label + dagger, scale=axis(log=not metric.share))
    base = alt.Chart(add(data, points))
    front = alt.Chart(add(data, _front(points, metric.higher_is_better)))
    layers = [
        front.mark_line(interpolate="step-after", color=NEUTRAL, opacity=0.6).encode(x=alt.X("bits:Q"), y=y),
        base.mark_rule().encode(
            x=x, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=color(points, methods), opacity=opacity()
        ),
        dots(base, x, y, points, methods, selects),
    ]
    factor = 100 if metric.share else 1
    reference = [factor * c.value(metric.name) for c in cells if c.is_reference and metric.name in c.metrics]
    if reference and (reference[0] > 0 or metric.share):  # full precision has no divergence from itself
        line = alt.Chart(add(data, [{"value": reference[0], "drawn": reference[0], "what": "full precision"}]))
        layers.append(line.mark_rule(strokeDash=[5, 4], color=NEUTRAL).encode(y=y, tooltip=tips("what:N", "value:Q")))
    return alt.layer(*layers).properties(width=250, height=260)


def _dodge(points: Points) -> None:
    """Set points of equal size side by side, in the order of the methods, nearer to their size than to the next one."""
    of_size: dict[float, Points] = {}
    for point in points:
        of_size.setdefault(point["bits"], []).append(point)
    sizes = sorted(of_size)
    gap = min((after - before for before, after in itertools.pairwise(sizes)), default=1)
    most = max(map(len, of_size.values()))
    step = min(0.02 * ((sizes[-1] - sizes[0]) or 1), 0.8 * gap / most)
    for size, same in of_size.items():
        for i, point in enumerate(same):
            point["position"] = size + step * (i - (len(same) - 1) / 2)


def _front(points: Points, higher_is_better: bool) -> Points:
    """The points that no other beats in both size and value."""
    sign = -1 if higher_is_better else 1
    front: Points = []
    for point in sorted(points, key=lambda p: (p["bits"], sign * p["value"])):
        if not front or sign * point["value"] < sign * front[-1]["value"]:
            front.append(point)
    return front
