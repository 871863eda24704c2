"""Several processes that share a job's tokens against one: the same losses, the same codes but for the order of sums."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from methods.core.formats.integer import Integer
from methods.core.job.files import ROOT
from methods.core.model.checkpoint import read_tensors
from tests.conftest import described

SCHEME = "{weights: {bits: 3, group_size: 32}}"
TRAINING = ["--samples", "32", "--batch-size", "2", "--accumulation", "2"]  # 8 steps of four sequences
CALIBRATION = ["--samples", "16"]


@pytest.fixture
def model(tiny, tmp_path):
    """The tiny model stored in float32, so that it computes in it: bfloat16 rounds batches of other sizes differently."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: t.float() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return described(folder)


@pytest.fixture
def text(tmp_path):
    ids = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0)).int()
    save_file({"input_ids": ids}, tmp_path / "t.safetensors", metadata={"dataset": "text"})
    return tmp_path / "t.safetensors"


def run(processes, method, model, text, output, *arguments, program=("-m", "methods")):
    """`python -m methods` in so many processes; what it printed."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, *program, method, "--model", model, "--scheme", SCHEME, "--tokens", text]
    command += ["--sequence-length", "32", "--threads", "1", "--output", output, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if torch.cuda.device_count() < processes:
        environment["PTQAT_DEVICE"] = "cpu"
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, start_new_session=True
    )


def codes(output):
    """All codes of a checkpoint, and its other numbers."""
    state = read_tensors(output / "checkpoint")
    grid, found = Integer(3, 32), []
    for name, packed in state.items():
        if name.endswith("weight_packed"):
            found.append(grid.unpack(packed, torch.Size(state[name.replace("packed", "shape")].tolist())).flatten())
    scales = torch.cat([t.float().flatten() for name, t in state.items() if name.endswith("weight_scale")])
    return torch.cat(found), scales


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "training/metrics.jsonl").read_text().splitlines()]


# Where all weights are trained the model is divided among the processes, a teacher too; so is a large one.
SHARED = {
    "lr_qat": [],
    "full_qat": [],
    "full_qat, checkpointing": ["--gradient-checkpointing"],
    "llm_qat": [],
    "fine_tune": ["--scheme", "{}", "--options", "{variant: full}"],
}
LARGE = """import sys
import methods.core.model.layers as layers
from methods.__main__ import main
layers.LARGEST_EXPANDED = 0
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("what", "processes"),
    [
        ("lr_qat", 2),
        ("lr_qat", 4),
        ("full_qat", 2),
        ("full_qat", 4),
        ("full_qat, checkpointing", 2),
        ("llm_qat", 2),
        ("fine_tune", 2),
    ],
)
def test_processes_that_share_a_training(model, text, tmp_path, what, processes):
    alone, together = tmp_path / "alone", tmp_path / "together"
    method, quantizes = what.split(",")[0], what != "fine_tune"
    for number, output in ((1, alone), (processes, together)):
        done = run(number, method, model, text, output, *TRAINING, *SHARED[what])
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4) and len(losses(together)) == 8
    if quantizes:
        (a, s), (b, t) = codes(alone), codes(together)
        assert (a != b).float().mean() < 1e-4
        assert torch.allclose(s, t, rtol=0.01)
    else:
        a, b = read_tensors(alone / "checkpoint"), read_tensors(together / "checkpoint")
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)
    one, several = (
        json.loads((output / "run.json").read_text())["steps"][0]["training"] for output in (alone, together)
    )
    assert several["processes"] == processes and several["tokens"] == 32 * 32
    assert (one["divided"], several["divided"]) == (False, what != "lr_qat")
    own = ("processes", "divided", "metrics_sha256")
    assert several | {key: one[key] for key in own} == one


@pytest.mark.parametrize("method", ["lr_qat", "dl_qat", "peqa"])
def test_processes_that_share_a_large_model(model, text, tmp_path, method):
    """Frozen codes are divided as well, and what is trained ends as in one process."""
    (tmp_path / "large.py").write_text(LARGE)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for number, output in ((1, alone), (2, together)):
        done = run(number, method, model, text, output, *TRAINING, program=[tmp_path / "large.py"])
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    (a, s), (b, t) = codes(alone), codes(together)
    assert (a != b).float().mean() < 1e-4 and torch.allclose(s, t, rtol=0.01)
    assert json.loads((together / "run.json").read_text())["steps"][0]["training"]["divided"]


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_processes_that_share_a_calibration(model, text, tmp_path, method):
    for number, output in ((1, tmp_path / "alone"), (2, tmp_path / "together")):
        done = run(number, method, model, text, output, *CALIBRATION)
        assert done.returncode == 0, done.stderr[-3000:]
    (a, s), (b, t) = codes(tmp_path / "alone"), codes(tmp_path / "together")
    # One weight at a boundary, rounded to the other side, moves those after it.
    assert (a != b).float().mean() < 0.01 and torch.allclose(s, t, rtol=0.01)


@pytest.mark.parametrize(("method", "first", "then"), [("lr_qat", 2, 1), ("full_qat", 2, 1), ("full_qat", 2, 4)])
def test_a_training_goes_on_with_another_number_of_processes(model, text, tmp_path, method, first, then):
    """So many processes train for half of the steps, are killed, and another number goes on."""
    whole = tmp_path / "whole"
    assert run(1, method, model, text, whole, *TRAINING).returncode == 0
    code = (
        "import sys; from methods.__main__ import main; from methods.core.job import saves\n"
        "from methods.core.training import loop\n"
        "saves.SECONDS, saves.SHARE, save = 0, float('inf'), loop._save_state\n"
        "def stop(path, optimizer, parameters, told, seconds):\n"
        "    save(path, optimizer, parameters, told, seconds)\n"
        "    if len(told) == 4: import os; os.kill(os.getppid(), 9); os.kill(0, 9)\n"
        "loop._save_state = stop\n"
        "main(sys.argv[1:])"
    )
    (tmp_path / "stopped.py").write_text(code)
    cut = tmp_path / "cut"
    done = run(first, method, model, text, cut, *TRAINING, program=[tmp_path / "stopped.py"])
    assert done.returncode != 0
    with safe_open(cut / "training/state.safetensors", framework="pt") as file:
        assert file.metadata()["metrics"].count("\n") == 4
    done = run(then, method, model, text, cut, *TRAINING)
    assert done.returncode == 0 and "resuming at step 4 of 8" in done.stderr, done.stderr[-2000:]
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)
    assert (codes(cut)[0] != codes(whole)[0]).float().mean() < 1e-4


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("rtn", [], "method rtn works in one process; torchrun is for"),
        ("gptq", ["--samples", "5"], "2 processes cannot share 5 samples equally"),
        (
            "lr_qat",
            ["--samples", "3", "--batch-size", "3"],
            "2 processes cannot share steps of 1 x 3 sequences equally",
        ),
    ],
)
def test_what_cannot_be_shared_is_an_error(model, text, tmp_path, method, arguments, message):
    done = run(2, method, model, text, tmp_path / "o", *arguments)
    assert done.returncode != 0 and message in done.stderr
    assert message in json.loads((tmp_path / "o/failed.json").read_text())["error"]
