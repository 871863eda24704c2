"""The report's figures, each a chart that is drawn in the page and saved as PNG and SVG alike."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils.schemapi import debug_mode

from reports.results import QUANTIZED, REFERENCE

# Okabe and Ito's colours, told apart by the colour-blind, without black, which a dark page would hide.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left")
NEUTRAL = "#888888"  # reads on white and on black
VERSION = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # of Vega-Lite, as Altair writes it
CAPTIONS = Path(__file__).parent / "captions"
# What is drawn against size, if it was measured: metric, axis label, factor, whether on a log scale.
PANELS = (
    ("perplexity", "perplexity (lower is better)", 1, True),
    ("zero_shot_avg8", "zero-shot average, % (higher is better)", 100, False),
    ("kl_mean", "KL, nats (lower is better)", 1, True),
)


@dataclass(frozen=True)
class Figure:
    """A chart as a Vega-Lite specification, by the kind of figure it is and the model it is about."""

    kind: str
    model: str
    specification: dict[str, Any]

    @property
    def caption(self) -> str:
        return " ".join((CAPTIONS / f"{self.kind}.rst").read_text(encoding="utf-8").split())

    @property
    def path(self) -> str:
        """Of its PNG under the folder of figures."""
        return f"{self.kind}/{self.model}.png"


Data = dict[str, list[dict[str, Any]]]  # a figure's data by name
KINDS = ("quality", "cost", "training", "layers", "allocation", "gamma", "speed", "flips")


def figures(cells: pd.DataFrame, model: str, methods: list[str]) -> dict[str, Figure]:
    """All figures of a model by kind; `methods` are the report's, in the order that gives each its colour and shape."""
    rows = cells.to_dict("records")
    found = {}
    for kind in KINDS:
        data: Data = {}
        with debug_mode(False):  # the schema is for those who write charts, and takes half of the time
            chart = globals()[f"_{kind}"](rows, methods, data)
            if chart is not None:
                specification = _themed(chart).to_dict(validate=False) | {"datasets": data}
                found[kind] = Figure(kind, model, specification)
    return found


def save(figure: Figure, folder: Path) -> None:
    """Write FOLDER/MODEL.png and .svg."""
    svg = vl_convert.vegalite_to_svg(figure.specification | {"background": "white"}, vl_version=VERSION)
    (folder / f"{figure.model}.svg").write_text(svg, encoding="utf-8")
    scale = 1.5 if len(svg) < 1_000_000 else 1  # a figure of hundreds of cells is large enough as it is
    (folder / f"{figure.model}.png").write_bytes(vl_convert.svg_to_png(svg, scale=scale))


def _quality(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    panels = []
    for metric, label, factor, log in PANELS:
        points = _points(rows, metric, factor)
        if log:  # which has no place for zero, nor for an error bar that reaches it
            points = [p | {"low": max(p["low"], p["value"] / 10)} for p in points if p["value"] > 0]
        if len(points) < 2:
            continue
        lower = not next(r["metrics"][metric]["higher_is_better"] for r in rows if metric in r["metrics"])
        partial = any(r["metrics"].get(metric, {}).get("partial") for r in rows)
        _dodge(points)
        x = alt.X(
            "place:Q", title="bits per weight, scales included", scale=alt.Scale(zero=False, nice=False, padding=20)
        )
        y = alt.Y("value:Q", title=label + (" †" if partial else ""), scale=_axis(log))
        base = alt.Chart(_add(data, points))
        front = alt.Chart(_add(data, _front(points, lower)))
        layers = [
            front.mark_line(interpolate="step-after", color=NEUTRAL, opacity=0.6).encode(x=x, y=y),
            base.mark_rule().encode(x=x, y="low:Q", y2="high:Q", color=_colour(points, methods), opacity=_opacity()),
            _dots(base, x, y, points, methods, selects=not panels),
        ]
        reference = [factor * r[metric] for r in rows if r["method"] == REFERENCE and metric in r["metrics"]]
        if reference and (reference[0] > 0 or not log):  # full precision has no divergence from itself
            line = alt.Chart(_add(data, [{"value": reference[0], "what": "full precision"}]))
            layers.append(line.mark_rule(strokeDash=[5, 4], color=NEUTRAL).encode(y=y, tooltip=["what:N", "value:Q"]))
        panels.append(alt.layer(*layers).properties(width=250, height=260))
    return alt.hconcat(*panels) if panels else None


def _cost(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    points = _points(rows, "perplexity", 1)
    if len(points) < 2:
        return None
    named, panels = _add(data, points), []
    height = 200 if len(_order(points, "scheme")) <= 4 else 110
    costs = {
        "minutes": "time to quantize, minutes",
        "host": "peak host memory, GB",
        "device": "peak device memory, GB",
    }
    for column, title in costs.items():
        if all(point[column] is None for point in points):
            continue
        x = alt.X(f"{column}:Q", title=title, scale=alt.Scale(zero=False, nice=False, padding=15))
        y = alt.Y("value:Q", title="perplexity (lower is better)", scale=_axis(log=True))
        dots = _dots(alt.Chart(named), x, y, points, methods, selects=not panels).properties(width=260, height=height)
        row = alt.Facet("scheme:N", sort=_order(points, "scheme"), title=None)
        panels.append(dots.facet(row, columns=1).resolve_scale(x="independent", y="independent"))
    return alt.hconcat(*panels)


def _training(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    """At most 100 points a curve: a mean over as many steps as that takes."""
    curves = []
    for row in [r for r in rows if r["losses"]]:
        every = math.ceil(len(row["losses"]) / 100)
        parts = [row["losses"][i : i + every] for i in range(0, len(row["losses"]), every)]
        curve = {k: row[k] for k in ("scheme", "method", "seed")} | {"loss": [_finite(sum(p) / len(p)) for p in parts]}
        curves.append(curve | {"step": [min((i + 1) * every, len(row["losses"])) for i in range(len(parts))]})
    if not curves:
        return None
    chart = alt.Chart(_add(data, curves)).transform_flatten(["step", "loss"])
    few = max(len(curve["step"]) for curve in curves) <= 32
    chart = chart.mark_line(point=alt.OverlayMarkDef(size=20) if few else False)
    chart = chart.encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("loss:Q", title="training loss, nats per token", scale=alt.Scale(zero=False)),
        color=_colour(curves, methods),
        detail="seed:N",
        opacity=_opacity(),
        tooltip=["method:N", "scheme:N", "seed:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")],
    )
    chart = chart.properties(width=240, height=200).add_params(_selection())
    return chart.facet(alt.Facet("scheme:N", sort=_order(curves, "scheme"), title=None), columns=3)


def _layers(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    """Blocks from left to right, cells from top to bottom, a panel for each kind of layer."""
    points: dict[tuple[str, str], dict[str, Any]] = {}
    first = min((r["seed"] for r in rows), default=0)
    for row in _few([r for r in rows if r["seed"] == first and r["layers"]]):
        for name, error in row["layers"]:
            block, layer = _place(name)
            key = f"{row['scheme']} {row['method']}", layer
            point = points.setdefault(key, dict(zip(("cell", "layer"), key, strict=True)) | {"block": [], "error": []})
            point["block"].append(block)
            point["error"].append(_finite(error))
    if not points:
        return None
    # A point for each layer of each cell would make the page of a large matrix many megabytes longer.
    points = list(points.values())
    chart = alt.Chart(_add(data, points)).transform_flatten(["block", "error"]).mark_rect()
    chart = chart.encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("cell:N", title=None, sort=_order(points, "cell"), axis=alt.Axis(labelLimit=260)),
        color=alt.Color("error:Q", title="relative error", scale=alt.Scale(scheme="viridis", type="log")),
        tooltip=["cell:N", "layer:N", "block:O", "error:Q"],
    )
    blocks, cells = max(len(p["block"]) for p in points), len(_order(points, "cell"))
    chart = chart.properties(width=max(110, 5 * blocks), height=max(40, 14 * cells))
    return chart.facet(alt.Facet("layer:N", sort=_order(points, "layer"), title=None), columns=4)


def _allocation(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    """Bits of each layer, a panel for each scheme whose layers differ; all methods of a scheme have the same."""
    schemes = {r["scheme"]: r["bits"] for r in rows if len(set(r["bits"].values())) > 1}
    points = []
    for scheme, found in schemes.items():
        for name, bits in found.items():
            block, layer = _place(name)
            points.append({"scheme": scheme, "block": block, "layer": layer, "bits": bits})
    if not points:
        return None
    widths = sorted({p["bits"] for p in points})
    colours = alt.Scale(domain=widths, scheme="viridis")
    chart = alt.Chart(_add(data, points)).mark_rect(stroke="white", strokeWidth=0.5)
    chart = chart.encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("layer:N", title=None, sort=_order(points, "layer"), axis=alt.Axis(labelLimit=260)),
        color=alt.Color("bits:O", title="bits", scale=colours),
        tooltip=["scheme:N", "layer:N", "block:O", "bits:O"],
    )
    blocks = len(_order(points, "block"))
    chart = chart.properties(width=max(110, 12 * blocks), height=16 * len(_order(points, "layer")))
    return chart.facet(alt.Facet("scheme:N", sort=_order(points, "scheme"), title=None), columns=2)


def _gamma(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    """Perplexity over gamma, a panel for each scheme; a dotted line is the same method with a gamma for each group."""
    reference = next((r["perplexity"] for r in rows if r["method"] == REFERENCE and "perplexity" in r["metrics"]), None)
    points = [
        {
            "scheme": r["scheme"],
            "module": r["module"],
            "gamma": r["gamma"],
            "change": 100 * (r["perplexity"] / reference - 1),
        }
        for r in rows
        if reference and r["gamma"] != "" and "perplexity" in r["metrics"] and not r["unquantized"]
    ]
    fixed = [p for p in points if p["gamma"] != "search"]
    if len({p["gamma"] for p in fixed}) < 3:
        return None
    searched = [p for p in points if p["gamma"] == "search"]
    x = alt.X("gamma:Q", title="gamma", scale=alt.Scale(zero=False, padding=10))
    y = alt.Y("change:Q", title="perplexity above full precision, %", scale=alt.Scale(type="symlog", constant=5))
    colour = alt.Color(
        "module:N", title="method", scale=alt.Scale(domain=_order(points, "module"), range=list(COLOURS))
    )
    tooltip = ["module:N", "scheme:N", "gamma:N", alt.Tooltip("change:Q", format=".2f")]
    base = alt.Chart(_add(data, fixed + [p | {"gamma": None} for p in searched]))
    line = (
        base.transform_filter("datum.gamma !== null")
        .mark_line(point=True)
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
    )
    search = base.transform_filter("datum.gamma === null").mark_rule(strokeDash=[2, 3], size=2)
    search = search.encode(y=y, color=colour, tooltip=tooltip)
    six = base.mark_rule(color=NEUTRAL, strokeDash=[6, 4]).encode(y=alt.datum(6))
    layered = alt.layer(six, search, line).properties(width=240, height=220)
    facet = alt.Facet("scheme:N", sort=_order(points, "scheme"), title=None)
    return layered.facet(facet, columns=3).resolve_scale(y="independent")


def _speed(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    """Decoded tokens per second by batch size: each scheme's kernels beside 16 and 32 bits. Ends of a line: middle half.

    Over all repeats of all cells: 16 and 32 bits were timed beside each of them, and methods of a scheme share its kernels.
    """
    points = []
    rates: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        what = {"bfloat16": "bf16", "float32": "fp32", "packed": f"{row['scheme']} ({row['kernel']})"}
        for t in row["timings"]:
            if t["phase"] == "decode":
                rates.setdefault((what[t["weights"]], t["batch"]), []).append(t["tokens"] / t["seconds"])
    for (weights, batch), found in rates.items():
        low, middle, high = np.quantile(found, (0.25, 0.5, 0.75)).round(2).tolist()
        points.append({"weights": weights, "batch": batch, "rate": middle, "low": low, "high": high})
    if not points:
        return None
    base = alt.Chart(_add(data, points))
    y = alt.Y("weights:N", title=None, sort=_order(points, "weights"), axis=alt.Axis(labelLimit=260))
    colour = alt.Color("weights:N", title=None, legend=None, scale=alt.Scale(range=list(COLOURS)))
    tooltip = ["weights:N", "batch:Q", "rate:Q", "low:Q", "high:Q"]
    bars = base.mark_bar().encode(
        x=alt.X("rate:Q", title="decoded tokens per second"), y=y, color=colour, tooltip=tooltip
    )
    spread = base.mark_rule(color="black", size=2).encode(x=alt.X("low:Q"), x2="high:Q", y=y)
    layered = alt.layer(bars, spread).properties(width=210, height=alt.Step(20))
    facet = alt.Facet("batch:O", title="batch size")
    return layered.facet(facet, columns=3).resolve_scale(x="independent")


def _place(name: str) -> tuple[int, str]:
    """Block and name within it of a layer."""
    block, layer = re.match(r"(?:.*?\.(\d+)\.)?(.*)", name).groups()
    return int(block or 0), layer


def _finite(value: float) -> float | None:
    """A number as JSON has it."""
    return round(value, 4) if math.isfinite(value) else None


def _few(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, or, of more than can be looked at, the best of each kind and scheme."""
    if len(rows) <= 40:
        return rows
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in [r for r in rows if "perplexity" in r["metrics"]]:
        key = row["scheme"], row["kind"]
        if key not in best or row["perplexity"] < best[key]["perplexity"]:
            best[key] = row
    return [row for row in rows if any(row is chosen for chosen in best.values())]


def _flips(rows: list[dict[str, Any]], methods: list[str], data: Data) -> alt.TopLevelMixin | None:
    points = []
    for row in rows:
        found = [f for task, f in row["flips"].items() if not task.startswith("mmlu")]
        if not found or row["method"] == REFERENCE:
            continue
        key = {k: row[k] for k in ("scheme", "method", "seed")} | {"asked": sum(f.n for f in found)}
        points.append(key | {"change": "lost", "questions": -sum(f.worse for f in found)})
        points.append(key | {"change": "won", "questions": sum(f.better for f in found)})
    if not points:
        return None
    chart = alt.Chart(_add(data, points)).mark_bar()
    chart = chart.encode(
        x=alt.X("questions:Q", title="questions lost (left), won (right)", axis=alt.Axis(format="d")),
        y=alt.Y("method:N", title=None, sort=methods),
        yOffset="seed:N",
        color=_colour(points, methods),
        opacity=_opacity(),
        tooltip=["method:N", "scheme:N", "seed:N", "change:N", "questions:Q", "asked:Q"],
    )
    chart = chart.properties(width=240, height=alt.Step(18)).add_params(_selection())
    facet = alt.Facet("scheme:N", sort=_order(points, "scheme"), title=None)
    return chart.facet(facet, columns=3).resolve_scale(y="independent")


def _points(rows: list[dict[str, Any]], metric: str, factor: float) -> list[dict[str, Any]]:
    """What is drawn of each quantized row. Rows that are not would push all others to one edge; the tables have them."""
    points = []
    for row in rows:
        if row["unquantized"] or metric not in row["metrics"] or "bits_per_weight" not in row["metrics"]:
            continue
        value, error = factor * row[metric], factor * (row[f"{metric}_stderr"] or 0)
        point = {k: row[k] for k in ("scheme", "method", "seed")} | {"kind": QUANTIZED[row["kind"]]}
        point |= {"bits": row["bits_per_weight"], "value": value, "low": value - error, "high": value + error}
        memory = {place: _finite(row[f"{place}_memory_mb"] / 1000) for place in ("host", "device")}
        points.append(point | {"minutes": row["seconds"] / 60} | memory)
    return points


def _dodge(points: list[dict[str, Any]]) -> None:
    """Give points of equal size places side by side, in the order of the methods."""
    sizes = [p["bits"] for p in points]
    step = 0.02 * ((max(sizes) - min(sizes)) or 1)
    for size in set(sizes):
        same = [p for p in points if p["bits"] == size]
        for i, point in enumerate(same):
            point["place"] = size + step * (i - (len(same) - 1) / 2)


def _front(points: list[dict[str, Any]], lower_is_better: bool) -> list[dict[str, Any]]:
    """The points that no other beats in both size and value."""
    sign = 1 if lower_is_better else -1
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bits"], sign * p["value"])):
        if not front or sign * point["value"] < sign * front[-1]["value"]:
            front.append(point)
    return front


def _dots(
    base: alt.Chart, x: alt.X, y: alt.Y, points: list[dict[str, Any]], methods: list[str], selects: bool
) -> alt.Chart:
    number = [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("value", "low", "high", "bits", "minutes", "host")]
    dots = base.mark_point(filled=True, size=90).encode(
        x=x,
        y=y,
        color=_colour(points, methods),
        shape=alt.Shape("method:N", title="method", scale=_scale(points, methods, SHAPES)),
        opacity=_opacity(),
        tooltip=["method:N", "kind:N", "scheme:N", "seed:N", *number],
    )
    return dots.add_params(_selection()) if selects else dots


def _scale(points: list[dict[str, Any]], methods: list[str], values: tuple[str, ...]) -> alt.Scale:
    """A method's value is the same in every figure; the legend has the methods that a figure shows.

    There are as many shapes as colours plus one, so that no pair occurs twice among the first 56 methods.
    """
    shown = [m for m in methods if any(p["method"] == m for p in points)]
    return alt.Scale(domain=shown, range=[values[methods.index(m) % len(values)] for m in shown])


def _axis(log: bool) -> alt.Scale:
    if log:
        return alt.Scale(type="log", nice=False, padding=15)
    return alt.Scale(zero=False, nice=False, padding=15)


def _colour(points: list[dict[str, Any]], methods: list[str]) -> alt.Color:
    return alt.Color("method:N", title="method", scale=_scale(points, methods, COLOURS))


def _selection() -> alt.Parameter:
    """A click on a method in the legend sets it off from the others, in all panels of a figure."""
    return alt.selection_point(name="chosen", fields=["method"], bind="legend")


def _opacity():
    # By the selection's data, since a panel cannot name a parameter that another panel has.
    chosen = "!length(data('chosen_store')) || vlSelectionTest('chosen_store', datum)"
    return alt.condition(chosen, alt.value(1), alt.value(0.12))


def _add(data: Data, points: list[dict[str, Any]]) -> alt.NamedData:
    """Put points among a figure's data, and name them."""
    name = f"points{len(data)}"
    data[name] = points
    return alt.NamedData(name=name)


def _order(points: list[dict[str, Any]], column: str) -> list[str]:
    return list(dict.fromkeys(p[column] for p in points))


def _themed(chart: alt.TopLevelMixin) -> alt.TopLevelMixin:
    return (
        chart.configure(font="system-ui, DejaVu Sans, sans-serif", background="transparent")
        .configure_view(stroke=NEUTRAL, strokeOpacity=0.3)
        .configure_axis(gridOpacity=0.25, labelFontSize=11, titleFontSize=11)
        .configure_legend(orient="bottom", columns=4, symbolOpacity=1, labelLimit=260)
    )
