"""The regression check: which changes it lets pass and which not."""

import json
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest

from reports.regression import findings, read, read_tolerances, update
from tests.test_reports import ROOT, change_step, tree, write_cell, write_cell_again  # noqa: F401

BASE = np.linspace(2, 4, 50)


@pytest.fixture
def results(tree):  # noqa: F811
    root, cells = tree
    for i, cell in enumerate(cells):
        write_cell(root, cell, BASE + 0.1 * i)
    return root, cells


def kinds(baseline, current, rules=()):
    return {f.key: f.kind for f in findings(read(baseline), read(current), rules) if f.kind != "same"}


def run(*arguments):
    command = [sys.executable, "-m", "reports.regression", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_set_equals_itself_and_its_baseline(results, tmp_path):
    root, _ = results
    baseline = tmp_path / "baseline.csv"
    update(baseline, read(root))
    assert kinds(root, root) == kinds(baseline, root) == {}
    assert not set(pd.read_csv(baseline)["metric"]) & {"seconds", "host_memory_mb"}


def test_tolerances_by_rule_the_first_that_fits(results, tmp_path):
    root, cells = results
    baseline = tmp_path / "baseline.csv"
    update(baseline, read(root))
    write_cell_again(root, cells[1], BASE + 0.1 + 0.02)
    write_cell_again(root, cells[2], BASE + 0.2 - 0.02)
    rtn, gptq = ("m", "w4", "rtn", 0, 0, "perplexity"), ("m", "w4", "gptq", 0, 0, "perplexity")
    assert kinds(baseline, root, [{"metric": "perplexity", "relative": 0.01}]) == {rtn: "worse", gptq: "too good"}
    assert kinds(baseline, root, [{"metric": "perp*", "relative": 0.03}]) == {rtn: "within", gptq: "within"}
    rules = [{"method": "rtn", "metric": "*", "absolute": 0.1}, {"metric": "perplexity", "relative": 0.03}]
    assert kinds(baseline, root, rules) == {rtn: "worse", gptq: "within"}


def test_without_a_rule_the_paired_interval_decides(results, tmp_path):
    root, cells = results
    other = tmp_path / "other"
    other.mkdir()
    (other / "matrix.json").write_text((root / "matrix.json").read_text())
    changes = (0.0, 0.02 + 0.001 * np.sin(np.arange(50)), 0.02 * np.sin(np.arange(50)), -0.02 + 0.0 * BASE)
    for i, (cell, change) in enumerate(zip(cells, changes, strict=True)):
        write_cell(other, cell, BASE + 0.1 * i + change)
    changed = {key[1:3]: kind for key, kind in kinds(root, other).items()}
    # All of these are far inside the standard error of a single value, 0.1; on the same windows they are told apart.
    assert changed == {("w4", "rtn"): "worse", ("w4", "gptq"): "within", ("w3", "gptq"): "better"}
    # Against a table there are no windows to pair, so what counts is twice the standard error, 0.1 on either side.
    update(tmp_path / "b.csv", read(root))
    changed = {key[1:3]: kind for key, kind in kinds(tmp_path / "b.csv", other).items()}
    assert changed == {("w4", "rtn"): "worse", ("w4", "gptq"): "within", ("w3", "gptq"): "better"}
    # One window is no sample: what is told of it is what a single value tells.
    for folder, nll in ((root, 3.0), (other, 7.0)):
        for cell in cells:
            write_cell_again(folder, cell, np.full(1, nll))
    assert {key[1:3]: kind for key, kind in kinds(root, other).items()}["w4", "rtn"] == "worse"


def test_what_vanished_appeared_or_was_scored_otherwise(results, tmp_path):
    root, cells = results
    baseline = tmp_path / "baseline.csv"
    update(baseline, read(root))
    table = pd.read_csv(baseline)
    table.loc[table["method"] == "rtn", "protocol"] = "another"
    table = table[table["method"] != "full_precision"]
    table.to_csv(baseline, index=False)
    (root / cells[3]["path"] / "run.json").unlink()
    (root / cells[3]["path"] / "failed.json").write_text(json.dumps({"error": "ValueError: no", "log": "x.log"}))
    changed = kinds(baseline, root)
    assert changed["m", "none", "full_precision", 0, 0, "perplexity"] == "appeared"
    assert changed["m", "w4", "rtn", 0, 0, "perplexity"] == "protocol"
    assert changed["m", "w3", "gptq", 0, 0, "perplexity"] == "vanished"
    done = run(baseline, root)
    assert done.returncode == 1 and "failed" in done.stdout.splitlines()[0]
    assert "m/w3/gptq/seed0: ValueError: no (log: x.log)" in done.stdout
    with pytest.raises(ValueError, match="cells without a result"):
        update(baseline, read(root))


def test_what_is_not_a_number_is_worse_than_any(results, tmp_path):
    root, cells = results
    baseline = tmp_path / "baseline.csv"
    update(baseline, read(root))
    path = root / cells[1]["path"] / "evals/perplexity.json"
    result = json.loads(path.read_text())
    result["metrics"]["perplexity"]["value"] = float("nan")
    path.write_text(json.dumps(result))
    for rules in ([], [{"metric": "perplexity", "relative": 0.5}]):
        assert kinds(baseline, root, rules) == {("m", "w4", "rtn", 0, 0, "perplexity"): "worse"}
    assert kinds(root, root) == {}


def test_the_command(results, tmp_path):
    root, cells = results
    baseline = tmp_path / "baseline.csv"
    assert run(baseline, root).returncode == 2  # the baseline does not exist yet
    made = run(baseline, root, "--update")
    assert made.returncode == 0 and baseline.is_file()
    passed = run(baseline, root / "matrix.json")
    assert passed.returncode == 0 and "passed" in passed.stdout and "numbers: " in passed.stdout
    (tmp_path / "baseline.tolerances.yaml").write_text("- {metric: perplexity, relative: 0.001}\n")
    write_cell_again(root, cells[1], BASE + 0.15)
    failed = run(baseline, root)
    assert failed.returncode == 1 and "| m/w4/rtn/seed0 | perplexity |" in failed.stdout and "± 0.1 %" in failed.stdout
    write_cell_again(root, cells[1], BASE + 0.05)  # a fault may look like an improvement
    failed = run(baseline, root)
    assert failed.returncode == 1 and "### Better than the tolerance allows" in failed.stdout
    for rule in (
        "{metrics: perplexity, relative: 0.001}",
        "{metric: perplexity, relative: 1%}",
        "{model: 7, absolute: 1}",
    ):
        (tmp_path / "baseline.tolerances.yaml").write_text(f"- {rule}\n")
        wrong = run(baseline, root)
        assert (
            wrong.returncode == 2 and "is not a tolerance" in wrong.stderr and "scheme, method, metric" in wrong.stderr
        )
    assert run(tmp_path / "nothing.csv", root).returncode == 2


def test_numbers_of_another_version_are_named(results, tmp_path):
    root, _ = results
    baseline = tmp_path / "baseline.csv"
    update(baseline, read(root))
    text = run(baseline, root).stdout
    assert f"not made with what is installed: torch 2 for {version('torch')}." in text and "--forceall" in text
    assert "installed" not in run(baseline, baseline).stdout  # a table does not say what it was made with


def test_seconds_count_only_where_a_rule_says_so(results, tmp_path):
    root, cells = results
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "matrix.json").write_text((root / "matrix.json").read_text())
    for i, cell in enumerate(cells):
        write_cell(slow, cell, BASE + 0.1 * i)
    change_step(slow, cells[1], seconds={"apply": 99.9})
    assert kinds(root, slow) == {}
    rules = [{"metric": "seconds", "relative": 0.5}]
    assert kinds(root, slow, rules) == {("m", "w4", "rtn", 0, 0, "seconds"): "worse"}
    assert kinds(slow, root, rules) == {("m", "w4", "rtn", 0, 0, "seconds"): "better"}  # not too good: that fails


def test_the_committed_tolerances_are_understood():
    rules = read_tolerances(ROOT / "tests/baselines/smoke.tolerances.yaml")
    assert {rule["metric"] for rule in rules} >= {"perplexity", "perplexity-papers", "kl_mean*"}
