"""The regression check on the micro model: what is deliberately broken is caught, what is run again is not."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.smoke import RESULTS, ROOT
from tests.test_config import merged
from workflow import matrix

pytestmark = pytest.mark.workflow
BASELINE = ROOT / "tests/baselines/smoke.csv"
# What is broken: file, the code as it is, as it is not, and the cell that is run with it.
BREAKAGES = {
    "the sign of GPTQ's update": (
        "methods/core/compensation.py",
        "w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)",
        "w[end:].addmm_(factor[start:end, end:].T, errors, alpha=1)",
        ("w4-g64", "gptq"),
    ),
    "the sign of GPTQ's update within a block": (
        "methods/core/compensation.py",
        "block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)",
        "block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=1)",
        ("w4-g64", "gptq"),
    ),
    "a scale for one step more than there is": (
        "methods/core/formats/integer.py",
        "torch.maximum(-low, high) / self.q_max",
        "torch.maximum(-low, high) / (self.q_max + 1)",
        ("w4-g64", "rtn"),
    ),
    "a searched scale one step beside the best": (
        "methods/core/scales.py",
        "scale[part] = torch.where(better, s, scale[part])",
        "scale[part] = torch.where(better, s * (gamma - 1 / 50) / gamma, scale[part])",
        ("w4-g64", "rtn"),
    ),
    "QAT that trains nothing": (
        "methods/core/training/loop.py",
        "            optimizer.step()\n",
        "",
        ("w2-g64", "lr_qat"),
    ),
    "the sign of the teacher's distribution": (
        "methods/core/training/losses.py",
        "p -= t\n",
        "p += t\n",
        ("w2-g64", "llm_qat-text"),
    ),
    "codes that DL-QAT writes without its low-rank term": (
        "methods/dl_qat.py",
        "codes = self.format.encode(self.levels(), per_group(self.zero_point)).flatten(1)",
        "codes = self.format.quantize(self.weight.float(), self.scale, self.zero_point).codes",
        ("w2-g64", "dl_qat"),
    ),
    "the sign of Qronos' correction": (
        "methods/qronos.py",
        "moved = config.correction * drift(",
        "moved = -config.correction * drift(",
        ("w2-g64", "qronos"),
    ),
    "AutoRound that ascends": (
        "methods/auto_round.py",
        'p.sub_(p.grad.sign(), alpha=group["lr"])',
        'p.add_(p.grad.sign(), alpha=group["lr"])',
        ("w2-g64", "auto_round-light"),
    ),
    "scales that PEQA trains and does not write": (
        "methods/peqa.py",
        "return Rounded(self.codes, self.scale().detach(), self.zero_point, self.format)",
        "return Rounded(self.codes, self.scale.start, self.zero_point, self.format)",
        ("w2-g64", "peqa"),
    ),
    "LSQ's weights divided by another scale than they are multiplied by": (
        "methods/core/training/parametrizations.py",
        "per_group((-ratio).exp())",
        "per_group(ratio.exp())",
        ("w2-g64", "lsq"),
    ),
    "ten times the rate of torchao's QAT": (
        "methods/full_qat.py",
        '"recomputed": 4e-3',
        '"recomputed": 4e-2',
        ("w2-g64", "torchao_qat"),
    ),
    "a control that forgets what it has learned": (
        "methods/fine_tune.py",
        "self.linear.weight.data = self.low_rank(self.linear.weight.data).detach().to(self.linear.weight.dtype)\n",
        "\n",
        ("unquantized", "fine_tune"),
    ),
    "Block-AP that trains nothing": (
        "methods/core/training/reconstruction.py",
        "        optimizer.step()\n",
        "",
        ("w2-g64", "efficient_qat"),
    ),
    "AWQ's factors upside down": (
        "methods/awq.py",
        "factors = size.clamp(min=1e-4) ** alpha",
        "factors = size.clamp(min=1e-4) ** -alpha",
        ("w3-g64", "awq-rtn"),
    ),
    "SmoothQuant's factors without the weights": (
        "methods/smooth_quant.py",
        "largest.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)",
        "largest.clamp(min=1e-5) ** alpha",
        ("w4a8kv8", "smooth_quant-rtn"),
    ),
    "a residual stream that is not rotated": (
        "methods/rotate.py",
        "stream, made_of = random_orthogonal(embedding.weight.shape[1], generator)",
        'stream, made_of = torch.eye(embedding.weight.shape[1]).double(), "no rotation"',
        ("w3-g64", "rotated-rtn"),
    ),
    "nothing": ("methods/gptq.py", "", "", ("w4-g64", "gptq")),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_what_is_broken_is_caught(smoke, tmp_path, what):
    """One cell is run again by broken code, as the workflow runs it, and compared with the committed baseline."""
    file, right, wrong, (scheme, method) = BREAKAGES[what]
    broken = tmp_path / "broken"
    for name in ("methods", "evals"):
        shutil.copytree(smoke / name, broken / name, ignore=shutil.ignore_patterns("__pycache__"))
    (broken / "resources").symlink_to(smoke / "resources")
    shutil.copytree(smoke / "results", broken / "results", ignore=shutil.ignore_patterns("checkpoint"))
    code = (broken / file).read_text()
    assert right in code
    (broken / file).write_text(code.replace(right, wrong, 1))
    cell = run_cell(broken, scheme, method)
    command = [sys.executable, "-m", "reports.regression", BASELINE, broken / "results/smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == int(what != "nothing"), done.stdout + done.stderr
    if what != "nothing":  # it is the cell that is named, by its perplexity, its divergence or its weights
        assert set(re.findall(r"^### (\w+)", done.stdout, re.MULTILINE)) <= {"Worse", "Better"}
        assert set(re.findall(r"^\| (micro\S+) ", done.stdout, re.MULTILINE)) == {cell.path}


def run_cell(folder, scheme, method):
    """Quantize a cell, step by step, and evaluate it with the code in a folder, by the commands of the workflow."""
    m = matrix.load(merged(ROOT / "workflow/config/smoke.yaml"))
    cell = next(cell for cell in m.cells if (cell.scheme, cell.method) == (scheme, method))
    results = folder / RESULTS.removesuffix("/micro")
    for step in m.chain(cell):
        output, arguments = results / step.path, m.cell_arguments(step)
        words = ["methods", m.module(step.method), "--model", f"resources/models/{cell.model}", "--output", str(output)]
        words += [word for name in ("cell", "scheme", "options") for word in (f"--{name}", arguments[name])]
        if dataset := m.tokens(step):
            words += ["--tokens", m.token_file(cell.model, dataset), *m.token_arguments(step)]
        if before := m.start(step):
            words += ["--init-from", str(results / before.path / "checkpoint")]
        run(folder, words)
    evaluations = m.evaluation_arguments(cell.model)
    run(folder, ["evals", evaluations, "--checkpoint", str(output / "checkpoint"), "--output", str(output / "evals")])
    return cell


def run(folder, words):
    command = [sys.executable, "-m", *words, "--threads", "1"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_same_seeds_give_the_same_numbers(smoke, tmp_path):
    """Two cells run again are equal to the last digit, not only within tolerance."""
    results = tmp_path / "results/smoke"
    shutil.copytree(smoke / "results/smoke", results, ignore=shutil.ignore_patterns("checkpoint"))
    for name in ("methods", "evals"):
        (tmp_path / name).symlink_to(smoke / name)
    (tmp_path / "resources").symlink_to(smoke / "resources")
    for scheme, method in (("w3-g64", "gptq"), ("w2-g64", "dl_qat")):
        run_cell(tmp_path, scheme, method)
    none = tmp_path / "none.yaml"
    none.write_text("- {metric: '*', absolute: 0}\n")
    command = [sys.executable, "-m", "reports.regression", smoke / "results/smoke", results, "--tolerances", none]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    compared = re.search(r"(\d+) numbers: ", done.stdout)
    assert compared and int(compared[1]) > 550, done.stdout + done.stderr
    changed = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("| micro")]
    assert set(changed) <= {"seconds", "host_memory_mb", "device_memory_mb"}, done.stdout


def test_the_workflow_compared_with_the_baseline(smoke):
    text = (smoke / "reports/regression.md").read_text()
    assert text.startswith(
        "## Regression check of `results/smoke/matrix.json` against `tests/baselines/smoke.csv`: passed"
    )


def test_a_configuration_without_a_baseline_is_told_how_to_make_one(smoke):
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "8", "--", "regression"]
    done = subprocess.run(command, cwd=smoke, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0
    assert "python -m reports.regression tests/baselines/default.csv results/default --update" in done.stdout
