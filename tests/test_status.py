"""What is done, what is running, and how long the rest will take."""

import json
import os
import subprocess
import sys
import time
from datetime import datetime

import pytest

from reports.status import read_jobs, remaining, status
from tests.test_reports import ROOT, matrix_cell, plan


@pytest.fixture
def run(tmp_path):
    """Three cells: one done in 60 and 30 seconds, one that has run for 20, one that waits."""
    names = {"gptq": "gptq", "qat": "gptq", "other": "other"}
    cells = [matrix_cell("w4", plan(method, module)) for method, module in names.items()]
    results, logs = tmp_path / "results/t", tmp_path / "logs"
    results.mkdir(parents=True)
    (results / "matrix.json").write_text(json.dumps({"name": "t", "cells": cells, "evaluations": {}, "config": {}}))
    for stage, seconds in (("quantize", 60.0), ("evaluate", 30.0)):
        write_log(logs / "t" / cells[0]["path"] / f"{stage}.log", seconds)
        (logs / "t" / cells[0]["path"] / f"{stage}.benchmark.tsv").write_text(f"s\th:m:s\n{seconds}\t0\n")
    done = results / cells[0]["path"] / "evals"
    done.mkdir(parents=True)
    (done.parent / "run.json").write_text("{}")
    (done / "done.json").write_text("[]")
    write_log(logs / "t" / cells[1]["path"] / "quantize.log", 20, "\rtraining: 10%|x|\rtraining: 25%|xx|")
    return results, logs


def write_log(path, seconds, more=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    started = datetime.fromtimestamp(time.time() - seconds).astimezone().isoformat(timespec="seconds")
    path.write_text(f"started {started}\n{more}")


def test_states_and_the_time_that_is_left(run):
    jobs = read_jobs(*run)
    assert [j.state for j in jobs] == ["done", "done", "running", "waiting", "waiting", "waiting"]
    assert jobs[0].seconds == 60 and jobs[2].seconds == pytest.approx(20, abs=2)
    # 40 s of the running one and both evaluations; of the last cell's method none has finished.
    seconds, unknown = remaining(jobs)
    assert unknown == ["other"] and seconds == pytest.approx(40 + 30 + 30, abs=2)
    text = status(jobs)
    assert "1 of 3 cells are done; at least 1:" in text and "none has finished yet: other)" in text
    assert "training: 25%|xx|" in text and "training: 10%" not in text and "of ~1:00" in text


def test_a_job_that_says_nothing_any_more_has_stopped(run):
    log = run[1] / "t/m/w4/qat/seed0/quantize.log"
    os.utime(log, (time.time() - 3600, time.time() - 3600))
    assert read_jobs(*run)[2].state == "stopped"


def test_a_failed_job(run):
    folder = run[0] / "m/w4/qat/seed0"
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text(json.dumps({"error": "no"}))
    assert read_jobs(*run)[2].state == "failed"


def test_the_steps_that_other_cells_start_from_are_jobs_too(run):
    results, logs = run
    matrix = json.loads((results / "matrix.json").read_text())
    for cell in matrix["cells"][1:]:
        cell["steps"] = [plan("rotate") | {"path": "m/none/rotate/seed0"}, *cell["steps"]]
    (results / "matrix.json").write_text(json.dumps(matrix))
    jobs = read_jobs(results, logs)
    assert [j.path for j in jobs].count("m/none/rotate/seed0") == 1
    assert [(j.path, j.module, j.stage, j.state) for j in jobs][2] == (
        "m/none/rotate/seed0", "rotate", "quantize", "waiting",
    )  # fmt: skip
    assert remaining(jobs)[1] == ["rotate", "other"]
    text = status(jobs)
    assert "m/none/rotate/seed0" in text and "1 of 3 cells are done" in text
    # Of what starts from a step that failed nothing will come.
    (results / "m/none/rotate/seed0").mkdir(parents=True)
    (results / "m/none/rotate/seed0/failed.json").write_text(json.dumps({"error": "no"}))
    states = [j.state for j in read_jobs(results, logs)]
    assert states == ["done", "done", "failed", "failed", "failed", "failed", "failed"]


def test_nothing_known_is_said(run):
    for path in run[1].rglob("*.tsv"):
        path.unlink()
    assert remaining(read_jobs(*run)) == (0.0, ["gptq", "evaluation", "other"])
    command = [sys.executable, "-m", "reports.status", str(run[0]), "--logs", str(run[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "none has finished yet: gptq, evaluation, other" in done.stdout
    missing = subprocess.run([*command[:3], "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 1 and "nowhere/matrix.json" in missing.stderr
