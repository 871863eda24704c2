"""What the figures share: colors and shapes of methods, scales, selection, layers' names, and a chart's theme."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from reports.cells import QUANTIZED, Cell, several_budgets
from reports.metrics import find
from reports.tree import Results

# The colors of Okabe and Ito, told apart by the color-blind, without black, which a dark page would hide.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [1, 3], [10, 4], [6, 2, 2, 2, 2, 2])
NEUTRAL = "#888888"  # reads on white and on black
FAR = 10  # times the best: what lies farther is drawn at that edge

Points = list[dict[str, Any]]
Data = dict[str, Points]  # a figure's data by name
Chart = Callable[[Sequence[Cell], Results, Data], alt.TopLevelMixin | None]


def add(data: Data, points: Points) -> alt.NamedData:
    """Put points among a figure's data, and name them."""
    name = f"points{len(data)}"
    data[name] = points
    return alt.NamedData(name=name)


def specification(chart: Chart, cells: Sequence[Cell], results: Results) -> dict[str, Any] | None:
    """A figure's chart of some cells as Vega-Lite, themed and with its data; None where there is nothing to draw."""
    data: Data = {}
    with debug_mode(False):  # the schema is for those who write charts, and takes half of the time
        drawn = chart(cells, results, data)
        if drawn is None:
            return None
        themed = (
            drawn.configure(font="system-ui, DejaVu Sans, sans-serif", background="transparent")
            .configure_view(stroke=NEUTRAL, strokeOpacity=0.3)
            .configure_axis(gridOpacity=0.25, labelFontSize=11, titleFontSize=11, labelSeparation=6)
            .configure_legend(orient="bottom", columns=4, symbolOpacity=1, labelLimit=260)
        )
        return themed.to_dict(validate=False) | {"datasets": data}


def against_size(cells: Iterable[Cell], metric: str) -> Points:
    """What is drawn of each quantized cell. Cells that are not would push all others to one edge; the tables have them."""
    share, points = find(metric).share, []
    for cell in cells:
        if not cell.quantized or metric not in cell.metrics or "bits_per_weight" not in cell.metrics:
            continue
        factor, entry = 100 if share else 1, cell.metrics[metric]
        value, error = factor * entry.value, factor * (entry.stderr or 0)
        point = {"scheme": cell.scheme, "method": cell.method, "seed": cell.seed, "kind": QUANTIZED[cell.kind]}
        point |= {"bits": cell.value("bits_per_weight"), "value": value, "low": value - error, "high": value + error}
        memory = {"host": cell.run.host_memory_mb, "device": cell.run.device_memory_mb}
        point |= {"minutes": cell.run.seconds / 60} | {where: finite(mb / 1000) for where, mb in memory.items()}
        points.append(point)
    return points


def cap(points: Points, by: str, together: bool = False) -> None:
    """Set "drawn", where a point is drawn: at its value, but no farther than FAR times the best of its scheme or size (`by`),
    since a ruined checkpoint would push all others to one edge. together: one edge for all, of the worst group."""
    best: dict[Any, float] = {}
    for point in points:
        best[point[by]] = min(best.get(point[by], math.inf), point["value"])
    for point in points:
        edge = FAR * (max(best.values()) if together else best[point[by]])
        point["drawn"] = min(point["value"], edge)
        point |= {end: min(point[end], edge) for end in ("low", "high")}


def dots(base: alt.Chart, x: alt.X, y: alt.Y, points: Points, methods: Sequence[str], selects: bool) -> alt.Chart:
    """Points of `against_size` with the colors and shapes of their methods."""
    number = [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("value", "low", "high", "bits", "minutes", "host")]
    chart = base.mark_point(filled=True, size=90).encode(
        x=x,
        y=y,
        color=color(points, methods),
        shape=alt.Shape("method:N", title="method", scale=_scale(points, methods, SHAPES)),
        opacity=opacity(),
        tooltip=tips("method:N", "kind:N", "scheme:N", "seed:N", *number),
    )
    return chart.add_params(selection()) if selects else chart


def color(points: Points, methods: Sequence[str], legend: Any = alt.Undefined) -> alt.Color:
    return alt.Color("method:N", title="method", scale=_scale(points, methods, COLORS), legend=legend)


def dash(points: Points, methods: Sequence[str], legend: Any = alt.Undefined) -> alt.StrokeDash:
    """What tells lines of one color apart: solid for the first methods, then dashes. The legend is one with that of `color`
    if both are given the same."""
    dashes = [pattern for pattern in DASHES for _ in COLORS]
    return alt.StrokeDash("method:N", title="method", scale=_scale(points, methods, dashes), legend=legend)


def _scale(points: Points, methods: Sequence[str], values: Sequence[Any]) -> alt.Scale:
    """A method's value is the same in every figure; the legend has the methods that a figure shows.

    The shapes are one more than the colors, so that no pair occurs twice among the first 56 methods.
    """
    shown = [m for m in methods if any(p["method"] == m for p in points)]
    return alt.Scale(domain=shown, range=[values[methods.index(m) % len(values)] for m in shown])


def axis(log: bool) -> alt.Scale:
    if log:
        return alt.Scale(type="log", nice=False, padding=15)
    return alt.Scale(zero=False, nice=False, padding=15)


def selection() -> alt.Parameter:
    """A click on a method in the legend sets it off from the others, in all panels of a figure."""
    return alt.selection_point(name="chosen", fields=["method"], bind="legend")


def opacity() -> alt.OpacityValue:
    # By the selection's data, since a panel cannot name a parameter that another panel has.
    chosen = "!length(data('chosen_store')) || vlSelectionTest('chosen_store', datum)"
    return alt.OpacityValue(0.12, condition={"test": chosen, "value": 1})


def tips(*fields: str | alt.Tooltip) -> list[alt.Tooltip]:
    """What a mark tells. All channels are given as objects: a plain string takes Altair milliseconds to find its type."""
    return [field if isinstance(field, alt.Tooltip) else alt.Tooltip(field) for field in fields]


def order(points: Points, column: str) -> list[str]:
    """The values of a column, as they first occur."""
    return list(dict.fromkeys(p[column] for p in points))


def label(cell: Cell, cells: Iterable[Cell]) -> str:
    """A cell's method, with its budget where the cells differ in that."""
    return f"{cell.method} {cell.budget:,}" if cell.budget and several_budgets(cells) else cell.method


def block_and_layer(name: str) -> tuple[int, str]:
    """The block of a layer, and the layer's name within it."""
    block, layer = re.match(r"(?:.*?\.(\d+)\.)?(.*)", name).groups()
    return int(block or 0), layer


def finite(value: float) -> float | None:
    """A number as JSON has it."""
    return round(value, 4) if math.isfinite(value) else None
