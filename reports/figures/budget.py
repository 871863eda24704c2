"""Quality against training budget."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from reports.answer import mean
from reports.cells import QUANTIZED, Cell
from reports.crossing import Crossings, lies_between
from reports.document import QAT_AGAINST_PTQ, Place
from reports.figures._charts import NEUTRAL, Data, Points, add, axis, color, finite, opacity, selection, tips
from reports.tree import Results

PLACE = Place(QAT_AGAINST_PTQ, order=-1)
COLUMNS = {"budget": "training tokens", "minutes": "minutes to quantize", "petaflop": "petaFLOP of training"}
KINDS = {"QAT": [1, 0], "fine-tune, then PTQ": [6, 3]}  # dashes of their lines


def chart(cells: Sequence[Cell], results: Results, data: Data) -> alt.TopLevelMixin | None:
    """A row for each scheme, a column for each cost, with the best PTQ and full precision as lines, and the crossing."""
    rows: list[alt.TopLevelMixin] = []
    reference = next((cell.value("perplexity") for cell in cells if cell.is_reference), None)
    for (model, scheme), found in results.crossings.items():
        if model != cells[0].model:
            continue
        points, ptq = _points(found), found.curves[0].ptq
        levels = {ptq[0].method: mean(ptq, "perplexity"), "full precision": reference}
        shown = [column for column in COLUMNS if all(point[column] is not None for point in points)]
        panels = [_panel(points, column, levels, found, results, data, selects=not rows) for column in shown]
        rows.append(alt.hconcat(*panels, title=alt.Title(scheme, anchor="start")))
    return alt.vconcat(*rows) if rows else None


def _points(found: Crossings) -> Points:
    """A point for each method and budget: the mean over seeds, and the least and the largest of them."""
    points = []
    for curve in found.curves:
        for budget, replicates in curve.replicates.items():
            values = [cell.value("perplexity") for cell in replicates]
            point = {"method": curve.method, "kind": QUANTIZED[curve.kind], "scheme": curve.scheme, "budget": budget}
            point |= {"value": sum(values) / len(values), "low": min(values), "high": max(values), "seeds": len(values)}
            point["minutes"] = finite(mean(replicates, "seconds") / 60)
            point["petaflop"] = finite(mean(replicates, "training_flops") / 1e15)
            points.append(point)
    return points


def _panel(
    points: Points,
    column: str,
    levels: dict[str, float | None],
    found: Crossings,
    results: Results,
    data: Data,
    selects: bool,
) -> alt.LayerChart:
    ticks = alt.Axis(values=sorted({p["budget"] for p in points}), format=",d") if column == "budget" else alt.Axis()
    scale = alt.Scale(type="log", nice=False, padding=15)
    x = alt.X(f"{column}:Q", title=COLUMNS[column], scale=scale, axis=ticks)
    y = alt.Y("value:Q", title="perplexity (lower is better)", scale=axis(log=True))
    base, tint = alt.Chart(add(data, points)), color(points, results.methods)
    numbers = [alt.Tooltip(f"{name}:Q", format=",.4g") for name in ("value", "low", "high", column)]
    dash = alt.StrokeDash("kind:N", legend=None, scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values())))
    curves = base.mark_line(point=alt.OverlayMarkDef(size=45), strokeWidth=2).encode(
        x=x,
        y=y,
        color=tint,
        strokeDash=dash,
        opacity=opacity(),
        tooltip=tips("method:N", "kind:N", "seeds:Q", *numbers),
    )
    if selects and column == "budget":
        curves = curves.add_params(selection())
    seeds = base.mark_rule().encode(x=x, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=tint, opacity=opacity())
    named = alt.Chart(add(data, [{"value": value, "what": what} for what, value in levels.items() if value]))
    rules = named.mark_rule(strokeDash=[5, 4], color=NEUTRAL).encode(y=y, tooltip=tips("what:N", "value:Q"))
    names = named.mark_text(align="left", dx=4, dy=-6, color=NEUTRAL).encode(x=alt.value(0), y=y, text="what:N")
    layers = [*_crossing(found, column, x, data), rules, names, seeds, curves]
    return alt.layer(*layers).properties(width=280, height=260)


def _crossing(found: Crossings, column: str, x: alt.X, data: Data) -> list[alt.Chart]:
    """Where the best QAT method crosses PTQ, and PTQ of fine-tuned models, with the intervals, as far as budgets were run."""
    curve, layers = found.best, []
    if curve is None or column == "petaflop":
        return []
    least, most = curve.budgets[0], curve.budgets[-1]
    for rival, crossing, dash in (
        ("PTQ", curve.crossing, [1, 0]),
        ("fine-tune, then PTQ", curve.against_control, [6, 3]),
    ):
        if not lies_between(crossing):
            continue
        at = [min(max(tokens, least), most) for tokens in (crossing.low, crossing.value, crossing.high)]
        low, value, high = at if column == "budget" else map(curve.minutes, at)
        band = alt.Chart(add(data, [{column: low, "end": high}])).mark_rect(color=NEUTRAL, opacity=0.18)
        line = alt.Chart(add(data, [{column: value, "method": curve.method, "ahead of": rival}]))
        line = line.mark_rule(color=NEUTRAL, strokeDash=dash)
        layers += [
            band.encode(x=x, x2=alt.X2("end:Q")),
            line.encode(x=x, tooltip=tips("method:N", "ahead of:N", f"{column}:Q")),
        ]
    return layers
