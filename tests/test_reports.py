"""The report from result files: numbers in their places, paired comparisons, what is missing."""

import json
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals import metric
from methods.core.recipe import chain, chain_kind
from reports.build import build
from reports.document import Place
from reports.metrics import REGISTER, details, find, headlines, measured_as, significant
from reports.tree import read_results

ROOT = Path(__file__).parent.parent
SCHEMES = {"none": {}, "w4": {"weights": {"bits": 4}}, "w3": {"weights": {"bits": 3}}}


KINDS = {"full_precision": "reference", "tune": "control", "rotate": "transform", "qat": "qat"}  # of modules; else ptq
TRAINING = {"dataset": "t", "tokens": 64, "sequence_length": 8, "batch_size": 2}


def plan(method, module=None, dataset=None, options=None):
    """A step as matrix.json has it."""
    options = {"damp": 0.01} if options is None else options
    tokens = {"dataset": dataset, "samples": 8, "sequence_length": 8, "batch_size": 2} if dataset else None
    return {"method": method, "module": module or method, "options": options, "tokens": tokens}


def matrix_cell(scheme, *steps, model="m"):
    """A cell as matrix.json has it; a step that is a name is of the module of that name."""
    steps = [plan(step) if isinstance(step, str) else step for step in steps]
    kinds = [KINDS.get(step["module"], "ptq") for step in steps]
    kind = chain_kind([(kind, kind in ("qat", "control")) for kind in kinds])
    cell = {"model": model, "scheme": scheme, "method": steps[-1]["method"], "seed": 0, "kind": kind, "steps": steps}
    return cell | {"path": f"{model}/{scheme}/{cell['method']}/seed0"}


def write_matrix(root, cells, **config):
    matrix = json.loads((root / "matrix.json").read_text())
    matrix |= {"cells": cells, "config": matrix["config"] | config}
    (root / "matrix.json").write_text(json.dumps(matrix))


def write_cell(root, cell, nll=None, right=None, sha256="a" * 64, evaluated_sha256=None, departures=()):
    """A cell that ran as planned: each step took 12.3 seconds, those with a dataset were trained on 64 tokens of it."""
    folder = root / cell["path"]
    (folder / "evals").mkdir(parents=True)
    steps = [_ran(step) for step in cell["steps"]]
    layers = [([10, 10], 0.5), ([10, 30], 0.1)] if steps[-1]["training"] else []
    about = {"layer": "model.layers.0.mlp.up_proj", "format": "integer", "bits": 4, "weight_error": 0.1}
    run = {
        "scheme": SCHEMES[cell["scheme"]],
        "steps": steps,
        "chain": chain(steps, None),
        "allocation": None,
        "layers": [about | {"shape": shape, "codes_changed": share} for shape, share in layers],
        "compute_dtype": "float32",
        "model": {"parameters": 1000},
        "departures": list(departures),
        "checkpoint_sha256": sha256,
        "provenance": {
            "date": "2026-01-01T00:00:00+00:00",
            "git_commit": "c",
            "python": "3.11",
            "versions": {"torch": "2"},
            "device": "cpu",
            "cores": 2,
            "threads": 2,
        },
    }
    (folder / "run.json").write_text(json.dumps(run))
    if steps[-1]["training"]:
        (folder / "training").mkdir()
        lines = [f'{{"step": {i}, "loss": {5 - i}}}\n' for i in range(3)]
        (folder / "training/metrics.jsonl").write_text("".join(lines))
    if nll is None:
        return
    pairing = {"column": "nll", "change": "relative"}
    perplexity = metric(np.exp(np.mean(nll)), 0.1, higher_is_better=False, unit="perplexity", items=pairing)
    footprint = {"bits_per_weight": metric(4.25, higher_is_better=False, unit="bits")}
    footprint["size_mb"] = metric(100.0, higher_is_better=False, unit="MB")
    sha256 = evaluated_sha256 or sha256
    write_result(folder, "perplexity", {"perplexity": perplexity}, sha256, {"window": range(len(nll)), "nll": nll})
    write_result(folder, "footprint", footprint, sha256)
    if right is not None:
        accuracy = np.concatenate([*right.values()]).mean()
        value = {"zero_shot_avg8": metric(accuracy, 0.05, higher_is_better=True, unit="share", over=[*right])}
        for task, answers in right.items():
            value[f"{task}/acc"] = metric(np.mean(answers), 0.05, higher_is_better=True, unit="share", over=[task])
        rows = [(task, task, i, answer) for task, answers in right.items() for i, answer in enumerate(answers)]
        columns = dict(zip(("group", "task", "item", "right"), map(list, zip(*rows, strict=True)), strict=True))
        write_result(folder, "zero_shot", value, sha256, columns, partial=True)


def _ran(step):
    """A step of matrix.json as run.json has it."""
    tokens, training = None, None
    if step["tokens"]:
        tokens = step["tokens"] | ({"seconds": "7.5"} if step["tokens"]["dataset"] == "generated" else {})
        training = {"tokens": 64, "flops": 10**9, "parameters": 25, "moved": 1.0, "learning_rates": [0.004, 0.01]}
    ran = {key: step[key] for key in ("method", "module", "options")} | {"kind": KINDS.get(step["module"], "ptq")}
    ran |= {"tokens": tokens, "training": training, "seconds": {"total": 13.0, "apply": 12.3}}
    return ran | {"peak_memory_mb": {"host": 456.0}, "checkpoint_sha256": "a" * 64, "residuals_sha256": None}


def change_step(root, cell, index=-1, **changes):
    """Change one step of a run, and with it what its chain cost."""
    path = root / cell["path"] / "run.json"
    run = json.loads(path.read_text())
    run["steps"][index] |= changes
    path.write_text(json.dumps(run | {"chain": chain(run["steps"], run["allocation"])}))


def read(root, matrix=None):
    """The cells of a result tree, by scheme and method."""
    if matrix:
        (root / "matrix.json").write_text(json.dumps(matrix))
    return {(cell.scheme, cell.method): cell for cell in read_results(root / "matrix.json").cells}


def compared(root):
    """The comparisons of the cells of a result tree, by scheme and method."""
    results = read_results(root / "matrix.json")
    return {(cell.scheme, cell.method): results.comparisons[cell] for cell in results.cells}


def write_result(folder, evaluation, metrics, sha256, items=None, partial=False):
    result = {
        "protocol": f"{evaluation}/x", "partial": partial, "metrics": metrics, "departures": [],
        "options": {}, "seconds": 1.0, "checkpoint_sha256": sha256,
    }  # fmt: skip
    (folder / f"evals/{evaluation}.json").write_text(json.dumps(result))
    if items:
        pd.DataFrame(items).to_parquet(folder / f"evals/{evaluation}.parquet")


@pytest.fixture
def tree(tmp_path):
    """A matrix of four cells, none of which has run."""
    names = (("none", "full_precision"), ("w4", "rtn"), ("w4", "gptq"), ("w3", "gptq"))
    cells = [matrix_cell(scheme, method) for scheme, method in names]
    calibration = {"dataset": "c", "samples": 2, "sequence_length": 8}
    config = {
        "schemes": SCHEMES,
        "models": {"m": {"note": "A note."}},
        "evaluations": {"perplexity": {}, "footprint": {}},
        "calibration": calibration,
        "training": TRAINING,
    }
    (tmp_path / "matrix.json").write_text(
        json.dumps({"name": "t", "cells": cells, "evaluations": {"perplexity": {}, "footprint": {}}, "config": config})
    )
    return tmp_path, cells


def test_the_change_is_paired_by_window(tree):
    root, cells = tree
    base = np.linspace(1, 5, 50)  # a spread far larger than the difference
    write_cell(root, cells[0], base)
    write_cell(root, cells[1], base + 0.1 + 0.01 * np.sin(np.arange(50)))
    interval = compared(root)["w4", "rtn"].changes["perplexity", "reference"]
    assert interval.value == pytest.approx(np.expm1(0.1), rel=0.01)
    assert interval.low > 0.10 and interval.high < 0.11 and interval.verdict(higher_is_better=False) == "worse"


def test_answers_are_compared_question_by_question(tree):
    root, cells = tree
    matrix = json.loads((root / "matrix.json").read_text())
    matrix["evaluations"]["zero_shot"] = {}
    (root / "matrix.json").write_text(json.dumps(matrix))
    generator = np.random.default_rng(0)
    base = {"a": generator.random(200) < 0.5, "b": generator.random(50) < 0.5}
    # Loses twenty questions of a and wins four, nothing changes in b.
    changed = {"a": base["a"].copy(), "b": base["b"]}
    changed["a"][np.flatnonzero(base["a"])[:20]] = False
    changed["a"][np.flatnonzero(~base["a"])[:4]] = True
    write_cell(root, cells[0], np.full(5, 3.0), base)
    write_cell(root, cells[1], np.full(5, 3.1), changed)
    write_cell(root, cells[2], np.full(5, 3.1), base)
    rtn = compared(root)["w4", "rtn"]
    average = rtn.changes["zero_shot_avg8", "reference"]
    assert average.value == pytest.approx(-16 / 200 / 2) and average.high < 0  # the mean over tasks, not over questions
    a, b = rtn.flips["a/acc"], rtn.flips["b/acc"]
    assert (a.worse, a.better, b.worse) == (20, 4, 0) and a.p < 0.01 and b.p == 1
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    text = (root / "summary.md").read_text()
    assert "zero-shot avg8 % †" in text and "-4.0 worse [" in text and "20, 4 of 250" in text
    assert "(20, 4)!" in text and "+0.0 tie [+0.0, +0.0]" in text


def test_margins_are_compared_question_by_question(tree):
    """As the mean over tasks of a number for each question; what is no task's score has no flips."""
    root, cells = tree
    matrix = json.loads((root / "matrix.json").read_text())
    (root / "matrix.json").write_text(json.dumps(matrix | {"evaluations": {**matrix["evaluations"], "zero_shot": {}}}))
    generator = np.random.default_rng(0)
    base = {"a": generator.normal(0, 5, 40), "b": generator.normal(0, 5, 10)}
    shift = {"a": generator.normal(-0.2, 0.1, 40), "b": generator.normal(-0.4, 0.1, 10)}
    for cell, factor in zip(cells[:2], (0, 1), strict=True):
        write_cell(root, cell, np.full(5, 3.0))
        margins = {task: base[task] + factor * shift[task] for task in base}
        value = np.mean([m.mean() for m in margins.values()])
        pairing = {"column": "margin", "change": "difference"}
        entry = metric(value, 0.7, higher_is_better=True, unit="nats", over=["a", "b"], items=pairing)
        rows = [(task, task, i, m > 0, m) for task, each in margins.items() for i, m in enumerate(each)]
        names = ("group", "task", "item", "right", "margin")
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        write_result(root / cell["path"], "zero_shot", {"zero_shot_margin": entry}, "a" * 64, columns)
    interval = compared(root)["w4", "rtn"].changes["zero_shot_margin", "reference"]
    assert interval.value == pytest.approx(np.mean([shift[task].mean() for task in shift]))
    assert interval.high < -0.2 and not compared(root)["w4", "rtn"].flips  # 50 questions are plenty
    cell = read(root)["w4", "rtn"]
    assert cell.metrics["zero_shot_margin"].items == "questions" and not cell.scores


def test_two_protocols_never_share_a_column(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    write_cell(root, cells[1], np.full(5, 3.1))
    path = root / cells[1]["path"] / "evals/perplexity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": "gptq-16/x"}))
    rtn = read(root)["w4", "rtn"]
    assert (rtn.state, rtn.reason) == (
        "missing",
        "perplexity was scored as gptq-16/x, full precision as perplexity/x",
    )
    assert np.isnan(rtn.value("perplexity")) and rtn.value("bits_per_weight") == 4.25


def test_results_of_other_items_are_not_compared(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0), {"a": [True] * 5})
    write_cell(root, cells[1], np.full(5, 3.0), {"a": [True] * 6})
    matrix = json.loads((root / "matrix.json").read_text())
    matrix["evaluations"]["zero_shot"] = {}
    with pytest.raises(ValueError, match="results of a under one protocol are not of the same items"):
        read(root, matrix)


def test_a_table_with_every_state(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    write_cell(root, cells[1], np.full(5, 3.2), departures=["damping raised"])
    write_cell(root, cells[2], np.full(5, 3.1))
    (root / cells[3]["path"]).mkdir(parents=True)
    (root / cells[3]["path"] / "failed.json").write_text(json.dumps({"error": "ValueError: no", "log": "x.log"}))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    text = (root / "summary.md").read_text()
    rows = table_rows(text, "All methods", "| w")
    assert [r[:2] for r in rows] == [["w4", "rtn *"], ["w4", "gptq"], ["w3", "gptq"]]
    assert rows[0][2] == "24.53 ± 0.10" and rows[1][2] == "**22.20** ± 0.10" and rows[2][2] == "failed"
    assert table_rows(text, "Against full precision", "| w4")[0][2].startswith("+22.1 % worse [")
    assert "m, w3, gptq, seed 0: failed. ValueError: no (log: x.log)" in text
    assert "m, w4, rtn, seed 0: damping raised" in text
    assert "> A note." in text and "Partial report: 3 of 4" in text
    assert (root / "summary/figures/quality/m.png").read_bytes().startswith(b"\x89PNG")
    assert (root / "summary/figures/quality/m.svg").read_text().startswith("<svg") and (
        root / "summary/figures/training"
    ).is_dir()
    table = pd.read_csv(root / "summary/tables/m-main.csv")
    assert table["perplexity"].tolist()[:3] == [str(np.exp(x)) for x in (3.0, 3.2, 3.1)]
    assert table["perplexity detail"][1] == "± 0.10"
    latex = (root / "summary/tables/m-main.tex").read_text()
    assert r"\toprule" in latex and r"\textbf{22.20} $\pm$ 0.10" in latex and r"full\_precision" in latex


def table_rows(text, section, start):
    """The entries of the rows of a section's table that begin so."""
    part = text.partition(f"### {section}\n")[2].partition("\n#")[0]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith(start)]


def test_what_is_not_of_a_report_is_not_written_over(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    (root / "summary/tables/.snakemake_timestamp").touch()
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    (root / "summary/tables/mine.xlsx").touch()
    with pytest.raises(ValueError, match="mine.xlsx; choose another --output"):
        build(root / "matrix.json", root / "summary.md", allow_missing=True)
    assert (root / "summary/tables/mine.xlsx").exists()


def test_every_number_is_in_the_tidy_table(tree):
    root, cells = tree
    base = np.linspace(2, 4, 50)
    write_cell(root, cells[0], base)
    write_cell(root, cells[1], base + 0.1)
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    table = pd.read_parquet(root / "summary/results.parquet").set_index(["scheme", "method", "metric"])
    row = table.loc[("w4", "rtn", "perplexity")]
    assert row["value"] == np.exp(3.1) and row["stderr"] == 0.1 and row["protocol"] == "perplexity/x"
    assert row["change"] == pytest.approx(np.expm1(0.1)) and not row["higher_is_better"] and row["unit"] == "perplexity"
    assert table.loc[("w4", "rtn", "seconds"), "value"] == 12.3
    assert set(table["state"]) == {"done", "missing"}  # a cell without numbers has a row too


def test_the_best_is_marked_and_what_ties_with_it(tree):
    root, cells = tree
    noise = np.sin(np.arange(50))
    write_cell(root, cells[0], np.full(50, 3.0))
    cells[3] = matrix_cell("w4", "other")
    write_matrix(root, cells)
    write_cell(root, cells[1], 3.4 + 0.01 * noise)  # clearly worse than the next two, which differ by chance
    write_cell(root, cells[2], 3.1 + 0.05 * noise)
    write_cell(root, cells[3], 3.1 + 0.001 - 0.05 * noise)
    rtn, gptq, other = (compared(root)["w4", method] for method in ("rtn", "gptq", "other"))
    assert "perplexity" in gptq.best and "perplexity" in other.ties
    assert "perplexity" not in rtn.best | rtn.ties
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    marks = [r[2] for r in table_rows((root / "summary.md").read_text(), "All methods", "| w4")]
    assert "*" not in marks[0] + marks[2] and marks[1].startswith("**") and marks[2].endswith("≈")
    # Without the clear loser nothing is told apart, so nothing is the best.
    write_cell_again(root, cells[1], 3.1 + 0.05 * np.cos(np.arange(50)))
    again = [compared(root)["w4", method] for method in ("rtn", "gptq", "other")]
    assert all("perplexity" in c.ties and not c.best for c in again)


def write_cell_again(root, cell, nll):
    shutil.rmtree(root / cell["path"])
    write_cell(root, cell, nll)


def test_a_failed_first_step_is_why_a_cell_has_not_run(tree):
    root, cells = tree
    cells[1] = matrix_cell("w4", "rotate", "rtn")
    cells[1]["steps"][0]["path"], cells[1]["steps"][1]["path"] = "m/none/rotate/seed0", cells[1]["path"]
    write_matrix(root, cells)
    folder = root / "m/none/rotate/seed0"
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text(json.dumps({"error": "ValueError: no", "log": "x.log"}))
    cell = read(root)["w4", "rtn"]
    assert (cell.state, cell.reason) == ("failed", "step 1 of 2, rotate, failed: ValueError: no (log: x.log)")
    (folder / "run.json").write_text("{}")  # a later attempt went well
    assert read(root)["w4", "rtn"].state == "missing"


def test_missing_cells_are_an_error_unless_allowed(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    with pytest.raises(ValueError, match="m/w4/rtn/seed0: the cell has no result"):
        build(root / "matrix.json", root / "summary.md", allow_missing=False)
    assert not (root / "summary.md").exists()


def test_a_result_of_an_older_checkpoint_does_not_count(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0), evaluated_sha256="b" * 64)
    cell = read(root)["none", "full_precision"]
    assert cell.state == "missing" and "older checkpoint" in cell.reason and "perplexity" not in cell.metrics


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("key", ["scheme", "options", "module", "dataset", "budget", "steps"])
def test_a_result_of_another_configuration_does_not_count(tree, key, where):
    """Whichever step of its chain is another one."""
    root, cells = tree
    cells[2] = matrix_cell("w4", plan("tune", dataset="t"), plan("qat", dataset="t"))
    write_matrix(root, cells)
    write_cell(root, cells[2], np.full(5, 3.0))
    assert read(root)["w4", "qat"].state == "done"
    matrix = json.loads((root / "matrix.json").read_text())
    if key == "scheme":
        matrix["config"]["schemes"]["w4"] = {"weights": {"bits": 5}}
    elif key == "budget":
        run = json.loads((root / cells[2]["path"] / "run.json").read_text())
        change_step(root, cells[2], where, tokens=run["steps"][where]["tokens"] | {"samples": 4})
    elif key == "steps":
        del matrix["cells"][2]["steps"][where]
    elif key == "dataset":
        matrix["cells"][2]["steps"][where]["tokens"]["dataset"] = "u"
    else:
        matrix["cells"][2]["steps"][where][key] = {"damp": 0.1} if key == "options" else "gptq"
    cell = read(root, matrix)["w4", "qat"]
    assert cell.state == "missing" and cell.reason == "its checkpoint was made with another configuration"


def test_results_of_an_older_version_are_missing(tree):
    root, cells = tree
    for cell in cells[:3]:
        write_cell(root, cell, np.full(5, 3.0))
    for cell, gone in zip(cells[1:3], ("steps", "scheme"), strict=True):
        path = root / cell["path"] / "run.json"
        run = json.loads(path.read_text())
        del run[gone]
        path.write_text(json.dumps(run))
    rows = read(root)
    assert rows["none", "full_precision"].state == "done"
    for method in ("rtn", "gptq"):
        cell = rows["w4", method]
        assert cell.state == "missing" and cell.reason == "its checkpoint was made by an older version"
    # A matrix.json of an older version says of no cell which steps it should have.
    older = [{key: value for key, value in cell.items() if key not in ("kind", "steps")} for cell in cells]
    write_matrix(root, older)
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    assert (
        "m, none, full_precision, seed 0: missing. its checkpoint was made by an older version"
        in (root / "summary.md").read_text()
    )


def test_training_and_its_control(tree):
    root, cells = tree
    cells[1] = matrix_cell("none", plan("tune", dataset="t"))
    cells[2] = matrix_cell("w4", "rtn", plan("gptq", module="qat", dataset="generated"))
    write_matrix(root, cells[:3])
    base = np.linspace(2, 4, 50)
    for cell, nll in zip(cells, (base, base - 0.1 - 0.01 * np.sin(np.arange(50)), base + 0.1), strict=False):
        write_cell(root, cell, nll)
    change_step(root, cells[2], 0, seconds={"total": 25.0, "apply": 20.0})
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    text = (root / "summary.md").read_text()
    assert table_rows(text, "All methods", "| w4")[0][1] == "gptq (from rtn)"
    assert table_rows(text, "Training", "| w4")[0][2:] == ["64", "generated", "0.004, 0.01", "2.5", "100", "20.00"]
    times = pd.read_csv(root / "summary/tables/m-main.csv")["time min"]
    assert times[2] == pytest.approx((12.3 + 20 + 7.5) / 60)
    assert "trained on 64 tokens of `t` (`tune`, seed 0) changes perplexity by -9.5 % [" in text
    # The same run in a matrix that asks for another text.
    cells[2]["steps"][1]["tokens"]["dataset"] = "t"
    write_matrix(root, cells[:3])
    assert read(root)["w4", "gptq"].state == "missing"


TUNE, QAT = plan("tune", dataset="t"), plan("qat", dataset="t")


@pytest.mark.parametrize(
    ("scheme", "steps", "kind", "tokens", "text"),
    [
        ("none", ["full_precision"], "reference", None, ()),
        ("none", ["rotate"], "transform", None, ()),
        ("none", [TUNE], "control", 64, ("t",)),
        ("w4", ["rtn"], "ptq", None, ()),
        ("w4", ["gptq", "rtn"], "ptq", None, ()),
        ("w4", ["rotate", "gptq"], "ptq", None, ()),
        ("w4", [QAT], "qat", 64, ("t",)),
        ("w4", [TUNE, "rtn"], "control_ptq", 64, ("t",)),
        ("w4", [QAT, "rtn"], "qat", 64, ("t",)),
        ("w4", [TUNE, "gptq", "rtn"], "control_ptq", 64, ("t",)),
        ("w4", [plan("tune", dataset="u"), QAT], "qat", 128, ("u", "t")),
    ],
)
def test_a_cell_is_of_the_kind_that_its_chain_makes_it(tree, scheme, steps, kind, tokens, text):
    root, _ = tree
    cell = matrix_cell(scheme, *steps)
    write_matrix(root, [cell])
    write_cell(root, cell, np.full(5, 3.0))
    (row,) = read(root).values()
    assert (row.state, row.kind, row.run.trained_on) == ("done", kind, text)
    assert row.run.training_tokens == tokens if tokens else np.isnan(row.run.training_tokens)


def test_the_reference_is_known_by_its_kind_and_a_transform_is_none(tree):
    """Whatever the reference is called, and whatever else is not quantized."""
    root, cells = tree
    cells[0] = matrix_cell("none", plan("original", module="full_precision"))
    cells = [matrix_cell("none", "rotate"), *cells[:2]]
    write_matrix(root, cells)
    for cell, step in zip(cells, (0.01, 0, 0.1), strict=True):
        write_cell(root, cell, np.linspace(2, 4, 50) + step)
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    text = (root / "summary.md").read_text()
    rows = table_rows(text, "Against full precision", "| none") + table_rows(text, "Against full precision", "| w4")
    assert [row[1] for row in rows] == ["rotate", "rtn"]
    assert rows[0][2].startswith("+1.0 % worse [") and rows[1][2].startswith("+10.5 % worse [")
    assert "Training control" not in text and "**m, none" not in text


def test_qat_beside_what_was_fine_tuned_and_then_quantized(tree):
    root, cells = tree
    cells[1]["as_in_paper"] = True
    cells[2] = matrix_cell("w4", TUNE, "gptq-after-tune") | {"as_in_paper": False}
    cells[3] = matrix_cell("w4", QAT)
    write_matrix(root, cells, equivalence={"perplexity": 0.2, "kl": 0.01, "accuracy": 0.01})
    base = np.linspace(2, 4, 50)
    for cell, step in zip(cells, (0, 0.3, 0.2, 0.1), strict=True):
        write_cell(root, cell, base + step + 0.001 * np.sin(np.arange(50) * step))
    change_step(root, cells[2], 0, seconds={"apply": 60.0})
    change_step(root, cells[3], peak_memory_mb={"host": 500.0, "device": 2000.0})
    path = root / cells[3]["path"] / "evals/footprint.json"
    result = json.loads(path.read_text())
    result["metrics"]["kl_floor"] = metric(0.00031, higher_is_better=False, unit="nats")
    path.write_text(json.dumps(result))
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    text = (root / "summary.md").read_text()
    (row,) = table_rows(text, "QAT against the best PTQ", "| w4")
    assert row[1:3] + row[4:5] == ["qat", "rtn", "gptq-after-tune"]
    assert row[3].startswith("-18.1 % better [") and row[5].startswith("-9.5 % better [")
    main = pd.read_csv(root / "summary/tables/m-main.csv").set_index("method")
    assert main["settings"].fillna("").to_dict() == {
        "full_precision": "", "rtn": "paper", "gptq-after-tune": "ours", "qat": "",
    }  # fmt: skip
    assert main.loc["qat", ["host GB", "device GB"]].tolist() == [0.5, 2.0] and main["device GB"].notna().sum() == 1
    assert main.loc["gptq-after-tune", "time min"] == pytest.approx((12.3 + 60) / 60)
    assert "- **m, w4, at 64 training tokens, one seed: `rtn` (PTQ, perplexity 27.1" in text
    assert "perplexity -9.5 % (equivalent)" in text  # within the margin that this configuration has
    assert "KL floor: up to 0.00031 nats per token" in text


def test_a_control_has_read_all_texts_that_qat_has_read(tree):
    """And not only the last of them."""
    root, cells = tree
    both = [plan("tune", dataset="u"), QAT]
    cells[1] = matrix_cell("w4", plan("tune", "tune", "t"), "gptq-after-tune")
    cells[2] = matrix_cell("w4", *both)
    cells[3] = matrix_cell("w4", plan("tune", dataset="u"), plan("more", "tune", "t"), "gptq-after-both")
    write_matrix(root, cells)
    for cell in cells:
        write_cell(root, cell, np.linspace(2, 4, 50))
    for tokens in (128, 64):  # whatever their number
        change_step(root, cells[1], 0, training={"tokens": tokens, "parameters": 25, "moved": 1.0})
        build(root / "matrix.json", root / "summary.md", allow_missing=False)
        text = (root / "summary.md").read_text()
        (row,) = table_rows(text, "QAT against the best PTQ", "| w4")
        assert row[1] == "qat (from tune)" and row[3] == "gptq-after-both"
    assert [row[3] for row in table_rows(text, "Training", "| w4")] == ["u + t"] and "128 u + t" in text


@pytest.mark.parametrize(("commits", "whole"), [("aa", True), ("ab", False), (["a-dirty"] * 2, False)])
def test_what_is_needed_to_reproduce_it(tree, commits, whole):
    root, cells = tree
    for cell, commit in zip(cells, commits, strict=False):
        write_cell(root, cell, np.full(5, 3.0))
        run = json.loads((path := root / cell["path"] / "run.json").read_text())
        path.write_text(json.dumps(run | {"provenance": run["provenance"] | {"git_commit": commit}}))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    text = (root / "summary.md").read_text()
    assert ("In a checkout of the commit above" in text) == whole
    assert ("was not that of one commit" in text) != whole


def test_a_report_before_anything_ran(tree):
    root, _ = tree
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    assert "0 of 4 cells" in (root / "summary.md").read_text()


def test_a_result_without_its_items_is_missing_and_a_failure_says_more(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    write_cell(root, cells[1], np.full(5, 3.1))
    write_cell(root, cells[2], np.full(5, 3.2))
    (root / cells[1]["path"] / "evals/perplexity.parquet").unlink()
    folder = root / cells[2]["path"] / "evals"
    (folder / "perplexity.failed.json").write_text(json.dumps({"error": "ValueError: the loss is not finite"}))
    (folder / "footprint.json").unlink()
    rtn, gptq = (read(root)["w4", method] for method in ("rtn", "gptq"))
    assert rtn.state == "missing" and "item by item" in rtn.reason
    assert gptq.state == "failed" and gptq.reason == "perplexity: ValueError: the loss is not finite"
    build(root / "matrix.json", root / "summary.md", allow_missing=True)


@pytest.mark.parametrize("change", ["relative", "difference"])
def test_a_new_metric_of_windows_is_paired_as_its_result_declares(tree, change):
    """And its table may have other columns beside, whatever they are called."""
    root, cells = tree
    matrix = json.loads((root / "matrix.json").read_text())
    matrix["evaluations"]["compression"] = {}
    bits = np.linspace(1, 2, 50)
    for cell, more in ((cells[0], 0), (cells[1], 0.1 + 0.01 * np.sin(np.arange(50)))):
        write_cell(root, cell, np.full(5, 3.0))
        pairing = {"column": "bits", "change": change}
        value = metric(np.mean(bits + more), 0.1, higher_is_better=False, unit="bits", items=pairing)
        columns = {"window": range(50), "bits": bits + more, "phase": ["x"] * 50, "nll": [0.0] * 50}
        write_result(root / cell["path"], "compression", {"bits_per_byte": value}, "a" * 64, columns)
    read(root, matrix)
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    table = pd.read_parquet(root / "summary/results.parquet").set_index(["method", "metric"])
    row = table.loc["rtn", "bits_per_byte"]
    expected = np.expm1(0.1) if change == "relative" else 0.1
    assert row["change"] == pytest.approx(expected, rel=0.02) and row["change_low"] > 0.9 * expected
    assert table.loc["rtn", "perplexity"]["change"] == 0


@pytest.mark.parametrize(
    "columns", [{"layer": ["a", "b"], "norm": [1.0, 2.0]}, {"window": [0, 1], "phase": ["x", "y"]}]
)
def test_a_table_that_no_metric_is_made_of_is_left_alone(tree, columns):
    root, cells = tree
    matrix = json.loads((root / "matrix.json").read_text())
    matrix["evaluations"]["outliers"] = {}
    write_cell(root, cells[0], np.full(5, 3.0))
    value = metric(1.5, higher_is_better=False, unit="x")
    write_result(root / cells[0]["path"], "outliers", {"norm": value}, "a" * 64, columns)
    cell = read(root, matrix)["none", "full_precision"]
    assert (
        cell.state == "done" and cell.value("norm") == 1.5 and list(cell.samples) == ["perplexity"] and not cell.speed
    )


def test_a_table_without_what_its_metrics_are_made_of_is_a_missing_result(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    pd.DataFrame({"window": [0]}).to_parquet(root / cells[0]["path"] / "evals/perplexity.parquet")
    cell = read(root)["none", "full_precision"]
    assert cell.state == "missing" and "perplexity.parquet lacks the columns nll" in cell.reason


def test_an_older_result_that_declares_no_items_has_no_samples(tree):
    root, cells = tree
    for cell in cells[:3]:
        write_cell(root, cell, np.full(5, 3.0))
        path = root / cell["path"] / "evals/perplexity.json"
        result = json.loads(path.read_text())
        del result["metrics"]["perplexity"]["items"]
        path.write_text(json.dumps(result))
    rtn = read(root)["w4", "rtn"]
    assert rtn.state == "done" and rtn.value("perplexity") == pytest.approx(np.exp(3)) and not rtn.samples
    build(root / "matrix.json", root / "summary.md", allow_missing=True)


def test_protocols_are_kept_apart_without_full_precision(tree):
    root, cells = tree
    write_matrix(root, cells[1:3])
    write_cell(root, cells[1], np.full(5, 3.0))
    write_cell(root, cells[2], np.full(5, 2.0))
    path = root / cells[2]["path"] / "evals/perplexity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": "gptq-16/x"}))
    rtn, gptq = read(root).values()
    assert (rtn.state, gptq.state) == ("done", "missing") and np.isnan(gptq.value("perplexity"))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)


def test_the_papers_numbers_stand_beside_ours(tree):
    root, cells = tree
    wikitext2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}
    matrix = json.loads((root / "matrix.json").read_text())
    matrix["config"] |= {"schemes": {"w4-pc": SCHEMES["w4"]}, "datasets": {"wikitext2": wikitext2}}
    matrix["config"] |= {
        "models": {"llama-7b": {}},
        "evaluations": {"perplexity": {"dataset": "wikitext2"}, "footprint": {}},
    }
    matrix["cells"] = [cells[1] | {"model": "llama-7b", "scheme": "w4-pc"}]
    write_cell(root, cells[1], np.full(5, np.log(6.5)))
    path = root / cells[1]["path"] / "evals/perplexity.json"
    for window, measured in ((2048, "6.500"), (512, "")):  # of other windows it is another number
        matrix["evaluations"]["perplexity"] = {"window": window}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"options": {"window": window}}))
        (root / "matrix.json").write_text(json.dumps(matrix))
        build(root / "matrix.json", root / "summary.md", allow_missing=False)
        text = (root / "summary.md").read_text()
        rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "LR-QAT, table 4" in line]
        ours = [row for row in rows if row[2:4] == ["rtn", "perplexity"]]
        assert ours == [["llama-7b", "w4-pc", "rtn", "perplexity", "6.33", measured, "LR-QAT, table 4"]]
        assert all(row[5] == "" for row in rows if row[2] != "rtn")


def test_names_and_notes_cannot_reach_the_page_as_markup(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    write_cell(root, cells[1], np.full(5, 3.1), departures=["<script>alert(1)</script>"])
    write_cell(root, cells[2], np.full(5, 3.2))
    matrix = json.loads((root / "matrix.json").read_text())
    note = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](http://127.0.0.1:9/b.png)"
    matrix["config"]["models"]["m"]["note"] = note
    (root / "matrix.json").write_text(json.dumps(matrix))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    page = (root / "summary.html").read_text()
    assert "&lt;img src=x" in page and "<img src=x" not in page and 'href="javascript:' not in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert 'src="http' not in page and "default-src 'none'" in page


NEW_TABLE = """
from reports.document import Place, Table
from reports.tables._entries import word

PLACE = Place("{section}"{more})


def table(cells, results):
    return Table("{name}", "A new one", ["method"], [[word(cell.method)] for cell in cells])
"""
NEW_FIGURE = '''
"""Points over nothing."""
import altair as alt

from reports.document import Place
from reports.figures._charts import add

PLACE = Place("Layers")


def chart(cells, methods, data):
    return alt.Chart(add(data, [{"seed": cell.seed} for cell in cells])).mark_point().encode(x="seed:Q")
'''


@pytest.fixture
def code(tmp_path):
    """A copy of the code, to add files to."""
    for package in ("methods", "reports"):
        ignored = shutil.ignore_patterns("__pycache__", "published")
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=ignored)
    return tmp_path / "code"


def build_with(code, root):
    command = [
        sys.executable,
        "-m",
        "reports.build",
        root / "matrix.json",
        "--allow-missing",
        "--output",
        root / "s.md",
    ]
    return subprocess.run(command, cwd=code, capture_output=True, text=True)


def test_a_new_table_and_a_new_figure_are_one_file_each(tree, code):
    """The other files stay as they are."""
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    for name, section, more in (("joining", "Tasks", ""), ("opening", "A new section", ", new=True")):
        (code / f"reports/tables/{name}.py").write_text(NEW_TABLE.format(section=section, name=name, more=more))
    (code / "reports/figures/novel.py").write_text(NEW_FIGURE)
    (code / "reports/figures/novel.rst").write_text("What it\nshows.\n")
    done = build_with(code, root)
    assert done.returncode == 0, done.stderr
    text = (root / "s.md").read_text()
    assert table_rows(text, "Tasks", "| full") == table_rows(text, "A new section", "| full") == [["full_precision"]]
    assert text.index("### Tasks") < text.index("### A new section") < text.index("## Cells without a result")
    assert "![Layers of m](s/figures/novel/m.png)\n\n*What it shows.*" in text
    assert (root / "s/figures/novel/m.png").is_file() and (root / "s/tables/opening.csv").is_file()
    # Snakemake's rule asks for the figures, with the titles that they have in its own report.
    script = "from reports.figures import titles; print(titles()['novel'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=code, capture_output=True, text=True, check=True)
    assert done.stdout == "Points over nothing\n"


def test_a_section_that_there_is_not_is_an_error_that_names_those_there_are(tree, code):
    (code / "reports/tables/stray.py").write_text(NEW_TABLE.format(section="Task", name="stray", more=""))
    done = build_with(code, tree[0])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: reports.tables.stray: 'Task' is no section of a model; these are 'All methods', " in done.stderr
    with pytest.raises(ValueError, match="no section of the whole report; these are 'Is QAT worth it"):
        Place("Tasks", per_model=False)


def test_a_misspelled_metric_is_an_error_once_everything_is_known(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    assert np.isnan(read(root)["none", "full_precision"].value("perplexty"))  # a result may come that has it
    for cell in cells[1:]:
        write_cell(root, cell, np.full(5, 3.0))
    path = root / cells[1]["path"] / "evals/footprint.json"
    result = json.loads(path.read_text())
    path.write_text(
        json.dumps(result | {"metrics": result["metrics"] | {"novel": metric(1, higher_is_better=True, unit="")}})
    )
    cell = read(root)["none", "full_precision"]
    assert all(np.isnan(cell.value(name)) for name in ("novel", "kl_mean", "decode_tokens_per_second/batch8"))
    with pytest.raises(KeyError, match="perplexty"):
        cell.value("perplexty")


def test_a_cell_cannot_be_changed(tree):
    (cell, *_) = read(tree[0]).values()
    with pytest.raises(FrozenInstanceError):
        cell.method = "another"


def test_the_register_of_metrics():
    assert [m.name for m in headlines({"zero_shot_avg6", "perplexity", "a/acc"})] == ["perplexity", "zero_shot_avg6"]
    assert [m.name for m in headlines({"zero_shot_avg6", "zero_shot_avg8"})] == ["zero_shot_avg8"]
    assert measured_as("zero_shot_avg8", {"zero_shot_avg6"}) == "zero_shot_avg6"
    assert measured_as("kl_mean", set()) == "kl_mean"
    assert find("decode_tokens_per_second/batch8").machine_dependent and not find("a/perplexity").heading
    assert all(name == metric.name for name, metric in REGISTER.items())


def test_a_metric_of_another_text():
    """It is what that of the first text is, in a column of its own beside it."""
    measured = {"kl_mean", "perplexity", "perplexity-c4", "perplexity-a-b", "kl_p99-c4"}
    assert [m.heading for m in headlines(measured)] == ["perplexity", "perplexity (a-b)", "perplexity (c4)", "KL"]
    assert [m.name for m in details(measured)] == ["kl_p99-c4"]
    found = find("perplexity-c4")
    assert replace(found, name="perplexity", heading="perplexity") == REGISTER["perplexity"]
    assert find("a-task/acc").name == "a-task/acc" and find("perplexity-c4").name == "perplexity-c4"


def test_a_step_may_train_on_calibration_text(tree):
    """Its budget is that of the calibration then."""
    root, cells = tree
    tokens = {"dataset": "c", "samples": 2, "sequence_length": 8}
    cells[1] = matrix_cell("w4", plan("qat", dataset="c") | {"tokens": tokens})
    write_matrix(root, cells)
    write_cell(root, cells[1], np.full(5, 3.0))
    assert read(root)["w4", "qat"].state == "done"
    change_step(root, cells[1], tokens=tokens | {"samples": 3})
    assert read(root)["w4", "qat"].state == "missing"


def test_numbers_have_four_digits_zeros_at_their_end_too():
    written = {25.0: "25.00", 27.523: "27.52", 999.96: "1000", 1054.7: "1055", 0.5: "0.5000", 2.5e6: "2.50e+06"}
    assert {value: significant(value) for value in written} == written
