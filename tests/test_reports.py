"""The report from result files: numbers in their places, paired comparisons, what is missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals import metric
from reports.build import build
from reports.results import read_cells, read_matrix

ROOT = Path(__file__).parent.parent
SCHEMES = {"none": {}, "w4": {"weights": {"bits": 4}}, "w3": {"weights": {"bits": 3}}}


def write_cell(root, cell, nll=None, right=None, sha256="a" * 64, evaluated_sha256=None, departures=()):
    folder = root / cell["path"]
    (folder / "evals").mkdir(parents=True)
    run = {
        "module": cell["method"],
        "scheme": SCHEMES[cell["scheme"]],
        "options": {"damp": 0.01},
        "tokens": None,
        "training": None,
        "init_from": None,
        "allocation": None,
        "layers": [],
        "compute_dtype": "float32",
        "model": {"parameters": 1000},
        "seconds": {"quantize": 12.3},
        "peak_memory_mb": {"host": 456.0},
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
    if nll is None:
        return
    perplexity = {"perplexity": metric(np.exp(np.mean(nll)), 0.1, higher_is_better=False, unit="perplexity")}
    footprint = {"bits_per_weight": metric(4.25, higher_is_better=False, unit="bits")}
    footprint["size_mb"] = metric(100.0, higher_is_better=False, unit="MB")
    sha256 = evaluated_sha256 or sha256
    write_result(folder, "perplexity", perplexity, sha256, {"window": range(len(nll)), "nll": nll})
    write_result(folder, "footprint", footprint, sha256)
    if right is not None:
        accuracy = np.concatenate([*right.values()]).mean()
        value = {"zero_shot_avg8": metric(accuracy, 0.05, higher_is_better=True, unit="share", over=[*right])}
        for task, answers in right.items():
            value[f"{task}/acc"] = metric(np.mean(answers), 0.05, higher_is_better=True, unit="share", over=[task])
        rows = [(task, task, i, answer) for task, answers in right.items() for i, answer in enumerate(answers)]
        columns = dict(zip(("group", "task", "item", "right"), map(list, zip(*rows, strict=True)), strict=True))
        write_result(folder, "zero_shot", value, sha256, columns, partial=True)


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
    cells = []
    for scheme, method in (("none", "full_precision"), ("w4", "rtn"), ("w4", "gptq"), ("w3", "gptq")):
        cell = {"model": "m", "scheme": scheme, "method": method, "seed": 0, "path": f"m/{scheme}/{method}/seed0"}
        cells.append(cell | {"module": method, "options": {"damp": 0.01}, "dataset": None, "init_from": None})
    calibration = {"dataset": "c", "samples": 2, "sequence_length": 8}
    config = {
        "schemes": SCHEMES,
        "models": {"m": {"note": "A note."}},
        "evaluations": {"perplexity": {}, "footprint": {}},
        "calibration": calibration,
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
    row = read_cells(read_matrix(root / "matrix.json"), root).iloc[1]
    interval = row["perplexity_against_reference"]
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
    rows = read_cells(read_matrix(root / "matrix.json"), root)
    average = rows.iloc[1]["zero_shot_avg8_against_reference"]
    assert average.value == pytest.approx(-16 / 200 / 2) and average.high < 0  # the mean over tasks, not over questions
    flips = rows.iloc[1]["flips"]
    assert (
        (flips["a"].worse, flips["a"].better, flips["b"].worse) == (20, 4, 0)
        and flips["a"].p < 0.01
        and flips["b"].p == 1
    )
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    text = (root / "summary.md").read_text()
    assert "zero-shot avg8 % †" in text and "-4.0 worse [" in text and "20, 4 of 250" in text
    assert "(20, 4)!" in text and "+0.0 tie [+0.0, +0.0]" in text


def test_two_protocols_never_share_a_column(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    write_cell(root, cells[1], np.full(5, 3.1))
    path = root / cells[1]["path"] / "evals/perplexity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": "gptq-16/x"}))
    row = read_cells(read_matrix(root / "matrix.json"), root).iloc[1]
    assert (
        row["state"] == "missing"
        and row["reason"] == "perplexity was scored as gptq-16/x, full precision as perplexity/x"
    )
    assert pd.isna(row["perplexity"]) and row["bits_per_weight"] == 4.25


def test_results_of_other_items_are_not_compared(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0), {"a": [True] * 5})
    write_cell(root, cells[1], np.full(5, 3.0), {"a": [True] * 6})
    matrix = read_matrix(root / "matrix.json")
    matrix["evaluations"]["zero_shot"] = {}
    with pytest.raises(ValueError, match="results of a under one protocol are not of the same items"):
        read_cells(matrix, root)


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
    assert rows[0][2] == "24.53 ± 0.1" and rows[1][2] == "**22.2** ± 0.1" and rows[2][2] == "failed"
    assert table_rows(text, "Against full precision", "| w4")[0][2].startswith("+22.1 % worse [")
    assert "m, w3, gptq, seed 0: failed. ValueError: no (log: x.log)" in text
    assert "m, w4, rtn, seed 0: damping raised" in text
    assert "> A note." in text and "Partial report: 3 of 4" in text
    assert (root / "figures/quality/m.png").read_bytes().startswith(b"\x89PNG")
    assert (root / "figures/quality/m.svg").read_text().startswith("<svg") and (root / "figures/training").is_dir()
    table = pd.read_csv(root / "tables/m-main.csv")
    assert table["perplexity"].tolist()[:3] == [str(np.exp(x)) for x in (3.0, 3.2, 3.1)]
    assert table["perplexity detail"][1] == "± 0.1"
    latex = (root / "tables/m-main.tex").read_text()
    assert r"\toprule" in latex and r"\textbf{22.2} $\pm$ 0.1" in latex and r"full\_precision" in latex


def table_rows(text, section, start):
    """The entries of the rows of a section's table that begin so."""
    part = text.partition(f"### {section}\n")[2].partition("\n#")[0]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith(start)]


def test_what_is_not_of_a_report_is_not_written_over(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    (root / "tables/.snakemake_timestamp").touch()
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    (root / "tables/mine.xlsx").touch()
    with pytest.raises(ValueError, match="mine.xlsx; choose another --output"):
        build(root / "matrix.json", root / "summary.md", allow_missing=True)
    assert (root / "tables/mine.xlsx").exists()


def test_every_number_is_in_the_tidy_table(tree):
    root, cells = tree
    base = np.linspace(2, 4, 50)
    write_cell(root, cells[0], base)
    write_cell(root, cells[1], base + 0.1)
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    table = pd.read_parquet(root / "results.parquet").set_index(["scheme", "method", "metric"])
    row = table.loc[("w4", "rtn", "perplexity")]
    assert row["value"] == np.exp(3.1) and row["stderr"] == 0.1 and row["protocol"] == "perplexity/x"
    assert row["change"] == pytest.approx(np.expm1(0.1)) and not row["higher_is_better"] and row["unit"] == "perplexity"
    assert table.loc[("w4", "rtn", "seconds"), "value"] == 12.3
    assert set(table["state"]) == {"done", "missing"}  # a cell without numbers has a row too


def test_the_best_is_marked_and_what_ties_with_it(tree):
    root, cells = tree
    noise = np.sin(np.arange(50))
    write_cell(root, cells[0], np.full(50, 3.0))
    cells[3] |= {"scheme": "w4", "method": "other", "module": "other", "path": "m/w4/other/seed0"}
    matrix = json.loads((root / "matrix.json").read_text()) | {"cells": cells}
    (root / "matrix.json").write_text(json.dumps(matrix))
    write_cell(root, cells[1], 3.4 + 0.01 * noise)  # clearly worse than the next two, which differ by chance
    write_cell(root, cells[2], 3.1 + 0.05 * noise)
    write_cell(root, cells[3], 3.1 + 0.001 - 0.05 * noise)
    rows = read_cells(read_matrix(root / "matrix.json"), root).set_index("method")
    assert "perplexity" in rows.loc["gptq", "best"] and "perplexity" in rows.loc["other", "ties"]
    assert not {"perplexity"} & (rows.loc["rtn", "best"] | rows.loc["rtn", "ties"])
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    marks = [r[2] for r in table_rows((root / "summary.md").read_text(), "All methods", "| w4")]
    assert "*" not in marks[0] + marks[2] and marks[1].startswith("**") and marks[2].endswith("≈")
    # Without the clear loser nothing is told apart, so nothing is the best.
    write_cell_again(root, cells[1], 3.1 + 0.05 * np.cos(np.arange(50)))
    rows = read_cells(read_matrix(root / "matrix.json"), root).set_index("method")
    assert not rows["best"].loc[["rtn", "gptq", "other"]].any() and all(
        "perplexity" in rows.loc[m, "ties"] for m in ("rtn", "gptq", "other")
    )


def write_cell_again(root, cell, nll):
    shutil.rmtree(root / cell["path"])
    write_cell(root, cell, nll)


def test_missing_cells_are_an_error_unless_allowed(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0))
    with pytest.raises(ValueError, match="m/w4/rtn/seed0: the cell has no result"):
        build(root / "matrix.json", root / "summary.md", allow_missing=False)
    assert not (root / "summary.md").exists()


def test_a_result_of_an_older_checkpoint_does_not_count(tree):
    root, cells = tree
    write_cell(root, cells[0], np.full(5, 3.0), evaluated_sha256="b" * 64)
    row = read_cells(read_matrix(root / "matrix.json"), root).iloc[0]
    assert row["state"] == "missing" and "older checkpoint" in row["reason"] and "perplexity" not in row.dropna()


@pytest.mark.parametrize("key", ["scheme", "options", "module", "init_from", "older"])
def test_a_result_of_another_configuration_does_not_count(tree, key):
    root, cells = tree
    write_cell(root, cells[1], np.full(5, 3.0))
    matrix = read_matrix(root / "matrix.json")
    assert read_cells(matrix, root).iloc[1]["state"] == "done"
    if key == "scheme":
        matrix["config"]["schemes"]["w4"] = {"weights": {"bits": 5}}
    elif key == "older":
        path = root / cells[1]["path"] / "run.json"
        run = json.loads(path.read_text())
        del run["module"]
        path.write_text(json.dumps(run))
    else:
        matrix["cells"][1][key] = {"damp": 0.1} if key == "options" else "gptq"
    row = read_cells(matrix, root).iloc[1]
    assert row["state"] == "missing" and "another configuration" in row["reason"]


def train_cell(root, cell, dataset, start=None):
    """Make a cell one that was trained on 64 tokens of `dataset`."""
    path = root / cell["path"] / "run.json"
    run = json.loads(path.read_text())
    run["training"] = {"tokens": 64, "parameters": 25, "moved": 1.0}
    run["tokens"] = {"dataset": dataset, "samples": 8, "sequence_length": 8, "batch_size": 2, "seconds": "7.5"}
    run["init_from"] = start
    layers = [([10, 10], 0.5), ([10, 30], 0.1)]
    about = {"layer": "model.layers.0.mlp.up_proj", "bits": 4, "weight_error": 0.1}
    run["layers"] = [about | {"shape": shape, "codes_changed": share} for shape, share in layers]
    (path.parent / "training").mkdir()
    (path.parent / "training/metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {5 - i}}}\n' for i in range(3))
    )
    path.write_text(json.dumps(run))


def test_training_and_its_control(tree):
    root, cells = tree
    cells[1] |= {"scheme": "none", "method": "tune", "module": "tune", "dataset": "t", "path": "m/none/tune/seed0"}
    cells[2] |= {"dataset": "generated", "init_from": "rtn"}
    matrix = json.loads((root / "matrix.json").read_text())
    matrix["config"]["training"] = {"dataset": "t", "tokens": 64, "sequence_length": 8, "batch_size": 2}
    (root / "matrix.json").write_text(json.dumps(matrix | {"cells": cells[:3]}))
    base = np.linspace(2, 4, 50)
    for cell, nll in zip(cells, (base, base - 0.1 - 0.01 * np.sin(np.arange(50)), base + 0.1), strict=False):
        write_cell(root, cell, nll)
    train_cell(root, cells[1], "t")
    train_cell(root, cells[2], "generated", {"method": "rtn", "checkpoint_sha256": "c" * 64, "seconds": 20.0})
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    text = (root / "summary.md").read_text()
    assert table_rows(text, "All methods", "| w4")[0][1] == "gptq (from rtn)"
    assert table_rows(text, "Training", "| w4")[0][2:] == ["64", "generated", "2.5", "100", "20.00"]
    assert pd.read_csv(root / "tables/m-main.csv")["time min"][2] == pytest.approx((12.3 + 20 + 7.5) / 60)
    assert "trained on 64 tokens of `t` (`tune`, seed 0) changes perplexity by -9.5 % [" in text
    # The same run in a matrix that asks for another text.
    matrix["cells"][2] |= {"dataset": "t", "init_from": "rtn"}
    assert read_cells(matrix, root).iloc[2]["state"] == "missing"


CONTROL = {"method": "tune", "quantizes": False, "training": {"tokens": 64, "dataset": "t"}, "init_from": None}


@pytest.mark.parametrize(
    ("scheme", "trains", "start", "kind", "tokens", "text"),
    [
        ("none", False, None, "reference", None, ""),
        ("none", True, None, "control", 64, "t"),
        ("w4", False, None, "ptq", None, ""),
        ("w4", False, {"method": "gptq", "seconds": 1.0}, "ptq", None, ""),  # a record of an older version
        ("w4", True, None, "qat", 64, "t"),
        ("w4", False, CONTROL, "control_ptq", 64, "t"),
        ("w4", False, CONTROL | {"quantizes": True}, "qat", 64, "t"),
        (
            "w4",
            False,
            {"method": "gptq", "quantizes": True, "training": None, "init_from": CONTROL},
            "control_ptq",
            64,
            "t",
        ),
        ("w4", True, CONTROL | {"training": {"tokens": 32, "dataset": "u"}}, "qat", 96, "t"),
    ],
)
def test_a_row_is_of_the_kind_that_its_chain_makes_it(tree, scheme, trains, start, kind, tokens, text):
    root, cells = tree
    cell = cells[1] | {"scheme": scheme, "init_from": start and start["method"], "dataset": "t" if trains else None}
    matrix = json.loads((root / "matrix.json").read_text()) | {"cells": [cell]}
    matrix["config"]["training"] = {"dataset": "t", "tokens": 64, "sequence_length": 8, "batch_size": 2}
    (root / "matrix.json").write_text(json.dumps(matrix))
    write_cell(root, cell, np.full(5, 3.0))
    start = start and {"seconds": 20.0} | start
    if trains:
        train_cell(root, cell, "t", start)
    else:
        path = root / cell["path"] / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_from": start}))
    row = read_cells(read_matrix(root / "matrix.json"), root).iloc[0]
    assert (row["state"], row["kind"], row["trained_on"]) == ("done", kind, text)
    assert row["training_tokens"] == tokens if tokens else np.isnan(row["training_tokens"])


def test_qat_beside_what_was_fine_tuned_and_then_quantized(tree):
    root, cells = tree
    cells[2] |= {"method": "gptq-after-tune", "path": "m/w4/gptq-after-tune/seed0", "init_from": "tune"}
    cells[2] |= {"module": "gptq-after-tune", "as_in_paper": False}
    cells[3] |= {"scheme": "w4", "method": "qat", "module": "qat", "path": "m/w4/qat/seed0", "dataset": "t"}
    cells[1]["as_in_paper"] = True
    matrix = json.loads((root / "matrix.json").read_text()) | {"cells": cells}
    matrix["config"]["training"] = {"dataset": "t", "tokens": 64, "sequence_length": 8, "batch_size": 2}
    matrix["config"]["equivalence"] = {"perplexity": 0.2, "kl": 0.01, "accuracy": 0.01}
    (root / "matrix.json").write_text(json.dumps(matrix))
    base = np.linspace(2, 4, 50)
    for cell, step in zip(cells, (0, 0.3, 0.2, 0.1), strict=True):
        write_cell(root, cell, base + step + 0.001 * np.sin(np.arange(50) * step))
    train_cell(root, cells[3], "t")
    path = root / cells[2]["path"] / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_from": CONTROL | {"seconds": 60.0}}))
    path = root / cells[3]["path"] / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_mb": {"host": 500.0, "device": 2000.0}}))
    path = root / cells[3]["path"] / "evals/footprint.json"
    result = json.loads(path.read_text())
    result["metrics"]["kl_floor"] = metric(0.00031, higher_is_better=False, unit="nats")
    path.write_text(json.dumps(result))
    build(root / "matrix.json", root / "summary.md", allow_missing=False)
    text = (root / "summary.md").read_text()
    (row,) = table_rows(text, "QAT against the best PTQ", "| w4")
    assert row[1:3] + row[4:5] == ["qat", "rtn", "gptq-after-tune"]
    assert row[3].startswith("-18.1 % better [") and row[5].startswith("-9.5 % better [")
    main = pd.read_csv(root / "tables/m-main.csv").set_index("method")
    assert main["settings"].fillna("").to_dict() == {
        "full_precision": "", "rtn": "paper", "gptq-after-tune": "ours", "qat": "",
    }  # fmt: skip
    assert main.loc["qat", ["host GB", "device GB"]].tolist() == [0.5, 2.0] and main["device GB"].notna().sum() == 1
    assert main.loc["gptq-after-tune", "time min"] == pytest.approx((12.3 + 60) / 60)
    assert "- **m, w4, at 64 training tokens, one seed: use `rtn` (PTQ, perplexity 27.1" in text
    assert "perplexity -9.5 % (equivalent)" in text  # within the margin that this configuration has
    assert "KL floor: up to 0.00031 nats per token" in text


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
    rows = read_cells(read_matrix(root / "matrix.json"), root).set_index(["scheme", "method"])
    assert rows.loc[("w4", "rtn"), "state"] == "missing" and "item by item" in rows.loc[("w4", "rtn"), "reason"]
    failed = rows.loc[("w4", "gptq")]
    assert failed["state"] == "failed" and failed["reason"] == "perplexity: ValueError: the loss is not finite"
    build(root / "matrix.json", root / "summary.md", allow_missing=True)


def test_protocols_are_kept_apart_without_full_precision(tree):
    root, cells = tree
    matrix = json.loads((root / "matrix.json").read_text()) | {"cells": cells[1:3]}
    (root / "matrix.json").write_text(json.dumps(matrix))
    write_cell(root, cells[1], np.full(5, 3.0))
    write_cell(root, cells[2], np.full(5, 2.0))
    path = root / cells[2]["path"] / "evals/perplexity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": "gptq-16/x"}))
    rows = read_cells(read_matrix(root / "matrix.json"), root)
    assert rows["state"].tolist() == ["done", "missing"] and pd.isna(rows["perplexity"][1])
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
    for window, measured in ((2048, "6.5"), (512, "")):  # of other windows it is another number
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
    matrix["config"]["models"]["m"]["note"] = "<img src=x onerror=alert(1)> [a](javascript:alert(1))"
    (root / "matrix.json").write_text(json.dumps(matrix))
    build(root / "matrix.json", root / "summary.md", allow_missing=True)
    page = (root / "summary.html").read_text()
    assert "&lt;img src=x" in page and "<img src=x" not in page and 'href="javascript:' not in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
