"""What the report says of mixed precision, gamma, speed and energy, and of a paper's claims about them."""

import json
import re

import numpy as np
import pytest

from evals import metric
from reports import regression
from reports.build import build
from reports.contents import contents
from reports.document import Table
from reports.tree import read_results
from reports.verify import verify
from tests.test_reports import SCHEMES, change_step, matrix_cell, plan, read, write_cell

GRIDS = {"none": {}, "w3": {"bits": 3}, "w4": {"bits": 4}, "w8": {"bits": 8}, "mixed": {"average_bits": 3.25}}
NLL = np.linspace(1, 3, 40)
STORED = {"none": 16.0, "w3": 3.25, "w4": 4.25, "w8": 8.0, "mixed": 3.24}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Full precision, and on three grids and a mixed one the same method; two have been timed, one has no kernel."""
    for scheme, weights in GRIDS.items():
        monkeypatch.setitem(SCHEMES, scheme, {"weights": weights} if weights else {})
    cells = []
    names = [("none", "full_precision"), *((scheme, "rtn") for scheme in ("w3", "mixed", "w4", "w8"))]
    names += [("w4", f"rtn-gamma{gamma}") for gamma in (1.0, 0.9, 0.8)]
    for scheme, method in names:
        options = {"scale": "minmax", "gamma": float(method[-3:])} if "gamma" in method else None
        cell = matrix_cell(scheme, plan(method, module=method.partition("-")[0], options=options))
        cells.append(cell)
        write_cell(tmp_path, cell, NLL + {"none": 0, "w3": 0.5, "mixed": 0.4, "w4": 0.2, "w8": 0.01}[scheme])
        parameters = {"parameters": 50 * 10**6}  # 100 MB in 16 bits
        patch(tmp_path, cell, "run.json", layers=layers(scheme), model=parameters)
        if scheme == "mixed":
            tokens = {"dataset": "c", "samples": 6, "sequence_length": 8}
            allocation = {"sha256": "f" * 64, "tokens": tokens, "seconds": 60.0, "departures": ["damping raised"]}
            patch(tmp_path, cell, "run.json", allocation=allocation)
            change_step(tmp_path, cell)  # the chain's cost has the allocation's
        size = {"bits_per_weight": STORED[scheme], "size_mb": 100 * STORED[scheme] / 16}
        patch(tmp_path, cell, "evals/footprint.json", metrics={k: value(v, "x") for k, v in size.items()})
    evaluations = {"perplexity": {}, "footprint": {}, "throughput": {}}
    for cell in cells:
        write_throughput(tmp_path, cell)
    config = {
        "schemes": SCHEMES,
        "models": {"m": {}},
        "evaluations": evaluations,
        "calibration": {"dataset": "c", "samples": 2, "sequence_length": 8},
        "allocation": {"samples": 6, "sequence_length": 8},
    }
    matrix = {"name": "t", "cells": cells, "evaluations": evaluations, "config": config}
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    return tmp_path


def value(number, unit, higher_is_better=False):
    return metric(number, higher_is_better=higher_is_better, unit=unit)


def patch(root, cell, name, **changes):
    path = root / cell["path"] / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def layers(scheme):
    bits = {"none": [None] * 4, "mixed": [2, 3, 4, 4]}.get(scheme) or [GRIDS[scheme]["bits"]] * 4
    names = [f"model.layers.{i}.{layer}" for i in (0, 1) for layer in ("q", "o")]
    return [
        {"layer": name, "format": b and "integer", "bits": b, "shape": [4, 8], "weight_error": 0.1}
        for name, b in zip(names, bits, strict=True)
    ]


def write_throughput(root, cell):
    """Decoding takes 8 s a token in fp32, 4 in bf16, 1.6 with the int4 kernel, 1 in llama.cpp; 3 bits and mixed have no
    kernel."""
    import pandas as pd

    seconds = {"float32": 8.0, "bfloat16": 4.0}
    kernel, reason, exported = None, None, None
    if cell["scheme"] == "w4":
        seconds["packed"], kernel = 1.6, "int4"
        seconds["llama.cpp"] = 1.0
        exported = {"version": "1", "build": "AVX2", "types": "Q4_0, BF16"}
    elif cell["scheme"] != "none":
        reason = "model.layers.0.q (3 bits): no such kernel"
    rows = [
        {
            "weights": name,
            "batch": 1,
            "repeat": r,
            "phase": phase,
            "seconds": s * (1 + 0.1 * r),
            "tokens": 1,
            "joules": None,
        }
        for name, s in seconds.items()
        for phase in ("prefill", "decode")
        for r in range(3)
    ]
    own = "packed" if kernel else "bfloat16"
    metrics = {}
    for name, s in seconds.items():
        suffix = "" if name == own and not reason else f"/{name}"
        metrics[f"decode_tokens_per_second{suffix}"] = value(1 / (1.1 * s), "tokens/s", True)
        metrics[f"decode_joules_per_token_estimate{suffix}"] = value(s / 100, "J")
        metrics |= {f"weights_mb{suffix}": value(s, "MB"), f"decode_bandwidth_share{suffix}": value(0.4, "share", True)}
    result = {
        "protocol": "p", "partial": False, "metrics": metrics, "departures": [], "options": {}, "seconds": 1.0,
        "checkpoint_sha256": "a" * 64,
        "data": {"kernel": kernel, "no_kernel": reason, "llama_cpp": exported, "bandwidth": 3.2e6},
    }  # fmt: skip
    folder = root / cell["path"] / "evals"
    (folder / "throughput.json").write_text(json.dumps(result))
    pd.DataFrame(rows).to_parquet(folder / "throughput.parquet")


def tables(root):
    sections = contents(read_results(root / "matrix.json"), "summary", verify(root, tensors=False))
    parts = [part for section in sections for part in section.parts if isinstance(part, Table)]
    return {table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in parts}


def test_mixed_precision_is_compared_with_the_same_method_at_the_same_size(tree):
    (row,) = tables(tree)["m-mixed"]
    assert row["uniform"].text == "w3"
    assert row["layers by bits"].text == "2: 1, 3: 1, 4: 2"
    assert row["perplexity"].value == pytest.approx(100 * np.expm1(-0.1))
    assert row["perplexity"].text.endswith("better")


def test_a_cell_without_an_allocation_says_what_it_waits_for(tree):
    (tree / "m/mixed/rtn/seed0/run.json").unlink()
    assert "no allocation.json" in read(tree)["mixed", "rtn"].reason
    (tree / "m/mixed/allocation.json").write_text("{}")
    assert "it has not run" in read(tree)["mixed", "rtn"].reason


def test_what_the_allocation_took_is_part_of_the_cost(tree):
    matrix = json.loads((tree / "matrix.json").read_text())
    cells = read(tree)
    mixed = cells["mixed", "rtn"]
    assert mixed.run.seconds == cells["w3", "rtn"].run.seconds + 60
    assert mixed.departures == ("damping raised",)
    matrix["config"]["allocation"]["samples"] = 7
    assert read(tree, matrix)["mixed", "rtn"].state == "missing"


def test_there_is_no_such_comparison_without_one_of_that_size(tree):
    footprint = {"bits_per_weight": value(3.3, "bits"), "size_mb": value(20, "MB")}  # 1.8 % more than the mixed one
    patch(tree, {"path": "m/w3/rtn/seed0"}, "evals/footprint.json", metrics=footprint)
    (row,) = tables(tree)["m-mixed"]
    assert row["uniform"].text == "none of this size"


def test_nor_with_one_that_quantizes_activations_too(tree):
    matrix = json.loads((tree / "matrix.json").read_text())
    scheme = {"weights": {"bits": 3}, "activations": {"bits": 8}}
    matrix["config"]["schemes"]["w3"] = scheme
    (tree / "matrix.json").write_text(json.dumps(matrix))
    patch(tree, {"path": "m/w3/rtn/seed0"}, "run.json", scheme=scheme)
    (row,) = tables(tree)["m-mixed"]
    assert row["uniform"].text == "none of this size"


def test_timings_that_are_gone_are_a_missing_result(tree):
    (tree / "m/w4/rtn/seed0/evals/throughput.parquet").unlink()
    cell = read(tree)["w4", "rtn"]
    assert cell.state == "missing" and "throughput.parquet" in cell.reason


def test_speeds_are_no_part_of_a_regression_check(tree):
    numbers = regression.read(tree / "matrix.json").numbers
    assert any(key[-1].startswith("decode_") for key in numbers.index)
    faster = numbers.assign(value=[2 * v if k[-1].startswith("decode_") else v for k, v in numbers["value"].items()])
    findings = regression.findings(*(regression.ResultSet(n, {}, []) for n in (numbers, faster)), [])
    assert {f.kind for f in findings} == {"same"} and not any("decode_" in f.key[-1] for f in findings)


def test_speeds_are_medians_and_ratios_of_one_process(tree):
    rows = {(r["scheme"].text, r["method"].text, r["kernel"].text): r for r in tables(tree)["m-hardware"]}
    packed, full = rows["w4", "rtn", "int4"], rows["none", "full_precision", "bf16"]
    without, deployed = rows["w3", "rtn", "none"], rows["w4", "rtn", "llama.cpp, Q4_0, BF16"]
    assert packed["decode tokens/s"].value == pytest.approx(1 / (1.1 * 1.6))
    assert packed["x bf16"].value == pytest.approx(2.5)
    assert packed["x fp32"].value == pytest.approx(5)
    assert packed["latency ms"].value == pytest.approx(1760)
    assert packed["limit tokens/s"].value == pytest.approx(2)
    assert deployed["x bf16"].value == pytest.approx(4)
    assert deployed["weights MB"].value == pytest.approx(1)
    assert deployed["energy mJ/token, estimated"].value == pytest.approx(10)
    assert full["x fp32"].value == pytest.approx(2)
    assert without["decode tokens/s"].text == "no kernel"
    assert without["x bf16"].text == ""
    assert packed["energy mJ/token, estimated"].value == pytest.approx(16)


def test_claims_stand_beside_what_was_measured(tree):
    rows = {r["claim"].text: r for r in tables(tree)["claims"]}
    assert "INT8: quality with gamma" not in rows  # no cell with 8 bits has a gamma
    assert rows["INT4: quality with gamma"]["measured"].text == "+22.1 %"
    assert "rtn-gamma" in rows["INT4: quality with gamma"]["measured"].detail
    assert rows["INT4: quality with gamma"]["holds here"].text == "no"
    assert rows["INT4: smaller"]["measured"].text == "73 % of 16 bits, 87 % of 32"
    assert [rows[f"INT{bits}: smaller"]["holds here"].text for bits in (4, 8)] == ["yes", "of 32 bits"]
    assert rows["INT4: throughput"]["measured"].text == "2.5 x (5.0 x fp32)"
    assert rows["INT4: throughput"]["holds here"].text == "no"  # the paper says 3
    assert rows["INT4: energy"]["measured"].text == "60 % less, estimate"
    assert rows["INT4: energy"]["holds here"].text == "not measured"
    assert "INT8: throughput" not in rows  # it was not measured


@pytest.mark.parametrize("other", ["format", "transform", "two steps"])
def test_other_ways_to_four_bits_are_no_evidence_of_int4(tree, other):
    cells = {(c["scheme"], c["method"]): c for c in json.loads((tree / "matrix.json").read_text())["cells"]}
    cell = cells["w4", "rtn"]
    if other == "format":
        patch(tree, cell, "run.json", layers=[layer | {"format": "e2m1"} for layer in layers("w4")])
    else:
        steps = json.loads((tree / cell["path"] / "run.json").read_text())["steps"]
        module, kind = ("rotate", "transform") if other == "transform" else ("rtn", "ptq")
        steps = [steps[0] | {"method": module, "module": module, "kind": kind}, *steps]
        patch(tree, cell, "run.json", steps=steps)
        matrix = json.loads((tree / "matrix.json").read_text())
        (planned,) = [c for c in matrix["cells"] if c["path"] == cell["path"]]
        planned["steps"].insert(0, plan(module))
        (tree / "matrix.json").write_text(json.dumps(matrix))
    for gamma in ("1.0", "0.9", "0.8"):
        (tree / f"m/w4/rtn-gamma{gamma}/seed0/run.json").unlink()
    assert read(tree)["w4", "rtn"].state == "done"
    assert [r["claim"].text for r in tables(tree)["claims"]] == ["INT8: smaller"]


def test_a_timed_control_is_of_16_bits(tree):
    """A fine-tuned model has no kernel of its own because it needs none."""
    matrix = json.loads((tree / "matrix.json").read_text())
    control = matrix_cell("none", plan("tune"))
    matrix["cells"].append(control)
    (tree / "matrix.json").write_text(json.dumps(matrix))
    write_cell(tree, control, NLL)
    write_throughput(tree, control)
    patch(tree, control, "run.json", layers=layers("none"))
    row = next(r for r in tables(tree)["m-hardware"] if r["method"].text == "tune")
    assert row["kernel"].text == "bf16" and row["x fp32"].value == pytest.approx(2)


def test_the_figures_and_the_page_have_them(tree, tmp_path):
    output = tmp_path / "report/summary.md"
    build(tree / "matrix.json", output, allow_missing=False)
    for kind in ("allocation", "gamma", "speed"):
        assert (output.parent / f"summary/figures/{kind}/m.png").stat().st_size > 5000
        svg = (output.parent / f"summary/figures/{kind}/m.svg").read_text()
        assert {"allocation": "mixed", "gamma": "gamma", "speed": "w4 (int4)"}[kind] in re.sub(r"<[^>]*>", " ", svg)
    bars = re.findall(r'aria-label="[^"]*weights: w4 \(int4\)[^"]*"[^>]*aria-roledescription="bar"', svg)
    assert len(bars) == 1  # of all methods of the scheme, not one on top of the other
    text = output.read_text()
    for title in ("Mixed precision", "Scaling factor gamma", "Speed and energy"):
        assert f"### {title}" in text
    assert "**estimate**" in text
