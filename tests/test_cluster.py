"""The workflow on a cluster: what jobs ask for, and a real Slurm on this machine."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from snakemake.utils import update_config

from methods.core.job.files import ROOT
from tests import cluster
from tests.smoke import RESULTS, copy_checkout
from workflow.matrix import load
from workflow.needs import of_step

CELLS = ("w4-g64/rtn/seed0", "w2-g64/gptq/seed0", "w2-g64/peqa/seed0-tokens32768")


@pytest.mark.workflow
def test_slurm_gives_the_numbers_of_a_local_run_through_kills(smoke, tmp_path):
    if reason := cluster.missing():
        pytest.skip(reason)
    checkout = copy_checkout(tmp_path)
    linked = shutil.ignore_patterns("packages")  # by copy_checkout
    shutil.copytree(smoke / "resources", checkout / "resources", dirs_exist_ok=True, ignore=linked)
    targets = [f"{RESULTS}/{cell}/evals/done.json" for cell in CELLS]
    with cluster.slurm():
        ended = cluster.exercise(checkout, targets, patience=600)
    # A step and its evaluations each; one that is cancelled when its files are in their place is not run again.
    assert ended["COMPLETED"] + ended["CANCELLED"] >= 2 * len(CELLS), ended
    assert ended["COMPLETED"] >= len(CELLS) and ended["CANCELLED"], ended
    assert ended["OUT_OF_MEMORY"] + ended["FAILED"] >= 1, ended
    for cell in CELLS:
        here, there = (numbers(folder / RESULTS / cell) for folder in (checkout, smoke))
        assert here and here == there, cell


def numbers(cell):
    """Every metric of a cell but those of the machine."""
    files = sorted((cell / "evals").glob("*.json"))
    results = [json.loads(file.read_text()) for file in files if file.name != "done.json"]
    return {result["evaluation"]: result["metrics"] for result in results}


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GB = 1000  # in MB


@pytest.fixture
def large(tmp_path):
    """A configuration of Llama-3-70B, of which only config.json is there."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(LLAMA_70B))
    config = {
        "name": "large",
        "models": {"llama": {"path": str(tmp_path / "llama"), "linear_widths": [8192, 28672]}},
        "calibration": {"samples": 32},
        "evaluations": {"throughput": None, "zero_shot": {"options": {"limit": 100}}, "mmlu": None},
        "matrix": [{"models": ["llama"], "schemes": ["w4-g64"], "methods": ["rtn", "gptq", "lr_qat", "lsq"]}],
    }
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_what_a_70b_matrix_asks_a_cluster_for(large):
    """By hand: embedding and head are 4.2 GB, two blocks of 0.86 billion weights with their codes 6.8, and two files of
    weights 4, whatever the other blocks are; evaluated, 68.5 billion weights are 41 GB of codes and scales. LR-QAT has phi in
    a byte, trains 0.41 billion values of rank 32 and 1.07 billion scales at 16 bytes each, and keeps 30 GB of activations.
    All weights at 16 bytes are 1.1 TB, and there is no such GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "workflow.resources", "--configfile", str(large)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip(" *").replace(",", "") for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    asked = {row[2].split()[1]: row for row in rows if row[:2] == ["quantize", "llama"]}
    memory = {method: int(row[3]) for method, row in asked.items()}
    device = {method: int(row[5]) for method, row in asked.items()}
    assert {row[4] for row in asked.values()} == {"1"}  # GPU
    assert 15 * GB < memory["rtn"] < 25 * GB
    assert 141 * GB < memory["lr_qat"] < 300 * GB
    assert memory["rtn"] <= memory["gptq"] < 1.2 * memory["rtn"]
    assert device["gptq"] < 80 * GB  # a block at a time
    assert 115 * GB < device["lr_qat"] < 135 * GB
    (evaluations,) = [row for row in rows if row[:2] == ["evaluate", "llama"] and "w4" in row[2]]
    assert 46 * GB < int(evaluations[5]) < 70 * GB
    assert 1.0e6 < device["lsq"] < 1.3e6
    assert "they will be killed here" in done.stdout
    # What all checkpoints are compared with is computed in fp32, with all weights: four bytes each.
    (reference,) = [row for row in rows if row[:2] == ["reference", "llama"]]
    assert 282 * GB < int(reference[5]) < 320 * GB
    marked = subprocess.run(
        [sys.executable, "-m", "workflow.resources", "--configfile", str(large), "--gpu-memory", "141"],
        capture_output=True,
        text=True,
    )
    over = [line.split("|")[1:4] for line in marked.stdout.splitlines() if "**" in line and "|" in line]
    assert [(job.strip(), what.split()[-3:]) for job, _, what in over] == [
        ("reference", ["divergence"]),
        ("quantize", ["lsq,", "8,192", "tokens"]),
    ]
    assert "need more than the 141,000 MB of a GPU" in marked.stdout


def test_a_model_of_unknown_shape_stops_a_cluster_only(large, tmp_path):
    (tmp_path / "llama/config.json").write_text(json.dumps({"model_type": "odd"}))
    run = [
        sys.executable,
        "-m",
        "snakemake",
        "-n",
        "--cores",
        "1",
        "--configfile",
        str(large),
        "--",
        "reports/summary.md",
    ]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [sys.executable, "-m", "workflow.resources", "--configfile", str(large)]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode != 0 and "it has no hidden_size or n_embd" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_machine_without_a_gpu_is_asked_for_what_processors_need(large, gpus):
    """What four processes would have on a GPU each is in the memory of the host then, four times."""

    def predicted(gpus, on_cpu):
        config = yaml.safe_load((ROOT / "workflow/config/default.yaml").read_text())
        update_config(config, yaml.safe_load(large.read_text()))
        config["models"]["llama"]["gpus"] = gpus
        matrix = load(config)
        matrix = matrix.without_gpus if on_cpu else matrix
        return {cell.method: (of_step(matrix, cell), matrix.processes(cell)) for cell in matrix.cells}

    here, processor, accelerated = predicted(gpus, True), predicted(0, False), predicted(gpus, False)
    for method, (needs, processes) in here.items():
        alone = processor[method][0]
        assert needs.device == needs.gpus == 0 and needs.runtime(2) == alone.runtime(2)
        assert processes == accelerated[method][1]
        if gpus == 1:
            assert needs == alone != accelerated[method][0]
    if gpus == 4:
        assert here["rtn"][0] == processor["rtn"][0]
        assert here["gptq"][0].host > 4 * processor["gptq"][0].host  # each has the whole model


def test_processes_that_share_tokens_have_a_gpu_each(large):
    """GPTQ and QAT on four GPUs; RTN reads no tokens to be shared."""
    config = yaml.safe_load(large.read_text())
    config["models"]["llama"]["gpus"] = 4
    large.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "-p", "--configfile", str(large), "--", "reports/summary.md"],
        capture_output=True,
        text=True,
    )
    text = done.stdout.replace("Shell command:", "")
    lines = [line.split() for line in text.splitlines() if " methods " in line]
    launchers = {line[line.index("methods") + 1]: line[: line.index("methods")] for line in lines}
    alone, together = ["python", "-m"], ["torchrun", "--standalone", "--nproc-per-node", "4", "-m"]
    assert launchers == {"rtn": alone, "gptq": together, "lr_qat": together, "full_qat": together}


def test_the_job_for_kubernetes_runs_the_workflow(tmp_path):
    """What the pod's container would run, as a dry run in a copy of the checkout; GPU, memory and image are named."""
    job = yaml.safe_load((ROOT / "workflow/profiles/kubernetes/job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,), (first,) = pod["containers"], pod["initContainers"]
    assert first["image"] == container["image"] and first["command"][-1] == container["workingDir"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 1}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {container["workingDir"]}
    command = [sys.executable, "-m", *container["command"], "-n", *container["args"]]
    done = subprocess.run(command, cwd=copy_checkout(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and "This was a dry-run" in done.stdout + done.stderr, done.stderr[-2000:]
