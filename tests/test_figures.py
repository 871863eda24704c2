"""What figures draw of cells that differ in their budgets, and of many methods of one size."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from reports.figures import flips, layers, quality, training
from reports.figures._charts import cap
from reports.run import Layer
from reports.statistics import Flips
from tests.test_answer import row

NLL = np.linspace(2, 4, 8)
METHODS = ["rtn", "qat"]


def budgets():
    """Cells of one method that differ in nothing but how much they were trained."""
    cell = row("w3", "qat", "qat", NLL)
    run = replace(cell.run, losses=(3.0, 2.0), layers=(Layer("model.layers.0.mlp", 3, 0.1),))
    return [replace(cell, run=run, budget=budget) for budget in (2048, 8192)]


def results(cells):
    compared = {cell: SimpleNamespace(task_flips=[Flips(16, 2, 3, 0.5)]) for cell in cells}
    return SimpleNamespace(methods=METHODS, comparisons=compared)


def test_many_methods_of_one_size_stay_beside_it():
    points = [{"bits": bits, "method": str(i)} for bits in (2.25, 3.25, 4.25) for i in range(24)]
    quality._dodge(points)
    assert all(abs(point["position"] - point["bits"]) < 0.5 for point in points)
    assert len({point["position"] for point in points}) == len(points)


def test_a_ruined_checkpoint_is_drawn_at_an_edge():
    def points():
        values = [("w4", 30.0), ("w4", 31.0), ("w2", 90.0), ("w2", 2e7)]
        return [{"scheme": s, "value": v, "low": v - 1, "high": v + 1} for s, v in values]

    drawn = points()
    cap(drawn, by="scheme")
    assert [p["drawn"] for p in drawn] == [30, 31, 90, 900] and drawn[3]["value"] == 2e7 and drawn[3]["low"] == 900
    values = [{"scheme": "w4", "value": 500.0, "low": 499.0, "high": 501.0}, *points()]
    cap(values, by="scheme", together=True)
    assert [p["drawn"] for p in values] == [500, 30, 31, 90, 900]


def test_flips_of_two_budgets_are_two_bars():
    cells, data = budgets(), {}
    chart = flips.chart(cells, results(cells), data).to_dict(validate=False)
    (points,) = data.values()
    fields = [chart["spec"]["encoding"][channel]["field"] for channel in ("y", "yOffset")]
    lost = [point for point in points if point["change"] == "lost"]
    assert len(lost) == len({tuple(point[field] for field in fields) for point in lost}) == 2


def test_losses_of_two_budgets_are_two_lines():
    cells, data = budgets(), {}
    chart = training.chart(cells, results(cells), data).to_dict(validate=False)
    fields = [detail["field"] for detail in chart["spec"]["encoding"]["detail"]]
    (curves,) = data.values()
    assert len({tuple(curve[field] for field in fields) for curve in curves}) == len(curves) == 2


def test_layers_of_two_budgets_are_two_rows():
    assert {point["cell"] for point in layers._points(budgets())} == {"w3 qat 2,048", "w3 qat 8,192"}
    assert {point["cell"] for point in layers._points(budgets()[:1])} == {"w3 qat"}
