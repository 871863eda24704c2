"""Methods that go block by block: killed in the middle, they go on there, with the same numbers to the last bit."""

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from methods.__main__ import main
from methods.core.job import saves
from methods.core.job.files import ROOT, read_json
from methods.core.model import layers, resume
from tests.conftest import SHAPE, flip, prepared

BLOCKS = 4


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return prepared(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS)), tmp_path / "model")


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """`python -m methods` on the model, cut off after so many blocks; run.json, and how many blocks were done in this run."""
    monkeypatch.setattr(saves, "SECONDS", 0)
    monkeypatch.setattr(saves, "SHARE", float("inf"))
    ids = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0)).int()
    save_file({"input_ids": ids}, tmp_path / "t.safetensors", metadata={"dataset": "text"})
    finished = resume.Resume.finished

    def run(output, method, options="{}", killed_after=BLOCKS + 1):
        done = []

        def noted(self, block, **streams):
            finished(self, block, **streams)
            done.append(block)
            if len(done) == killed_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(resume.Resume, "finished", noted)
        command = [method, "--model", model, "--scheme", "{weights: {bits: 3, group_size: 32}}", "--threads", 1]
        command += [
            "--tokens",
            tmp_path / "t.safetensors",
            "--samples",
            48,
            "--sequence-length",
            32,
            "--options",
            options,
        ]
        try:
            main([str(a) for a in [*command, "--output", tmp_path / output]])
        except KeyboardInterrupt:
            return None, done
        assert not (tmp_path / output / "training/blocks").exists()
        return read_json(tmp_path / output / "run.json"), done

    return run


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", "{}"),
        ("gptq", "{}"),
        ("gptq", "{true_sequential: false}"),
        ("qronos", "{}"),
        ("auto_round", "{steps: 6}"),
        ("block_ap", "{}"),
    ],
)
def test_a_killed_method_goes_on_after_the_blocks_that_are_done(run, method, options):
    whole, done = run("whole", method, options)
    assert done == list(range(BLOCKS))
    assert run("cut", method, options, killed_after=1) == (None, [0])
    assert run("cut", method, options, killed_after=2) == (None, [1, 2])  # killed twice
    resumed, done = run("cut", method, options)
    assert done == [3]
    assert resumed["checkpoint_sha256"] == whole["checkpoint_sha256"]
    assert resumed["steps"][0]["residuals_sha256"] == whole["steps"][0]["residuals_sha256"]
    assert resumed["layers"] == whole["layers"] and resumed["departures"] == whole["departures"]
    if whole["steps"][0]["training"]:
        assert resumed["steps"][0]["training"] == whole["steps"][0]["training"]


@pytest.mark.parametrize("method", ["gptq", "qronos", "auto_round"])
def test_a_large_model_gives_the_same_numbers(run, monkeypatch, method):
    """Its finished blocks are in files only; killed, it goes on from these."""
    whole, _ = run("whole", method)
    monkeypatch.setattr(layers, "LARGEST_EXPANDED", 0)
    assert run("large", method, killed_after=2) == (None, [0, 1])
    large, done = run("large", method)
    assert done == [2, 3] and large["checkpoint_sha256"] == whole["checkpoint_sha256"]
    assert large["layers"] == whole["layers"]
    assert large["steps"][0]["residuals_sha256"] == whole["steps"][0]["residuals_sha256"]


@pytest.mark.parametrize("damage", ["changed", "lost"])
@pytest.mark.parametrize("name", ["streams", "layers-00001", "layers-00000"])
def test_a_state_that_was_damaged_is_not_gone_on_from(run, tmp_path, capsys, name, damage):
    whole, _ = run("whole", "gptq")
    run("cut", "gptq", killed_after=2)
    path = tmp_path / f"cut/training/blocks/{name}.safetensors"
    if damage == "changed":
        flip(path)
    else:
        path.unlink()
    resumed, done = run("cut", "gptq")
    assert done == list(range(BLOCKS))
    assert damage == "lost" or f"{path} has been changed or damaged" in capsys.readouterr().err
    assert resumed["checkpoint_sha256"] == whole["checkpoint_sha256"]


STOPPED = """
import os, signal, sys
from methods.__main__ import main
from methods.core.job import files, saves

saves.SECONDS, saves.SHARE, replace = 0, float("inf"), os.replace

def dying(source, target):
    if target.name == "streams.safetensors" and (target.parent / "layers-00002.safetensors").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = dying
main(sys.argv[1:])
"""


def test_a_job_that_the_kernel_kills_while_it_writes_goes_on(run, model, tmp_path):
    """Killed between the layers of the third block and the state that counts them."""
    whole, _ = run("whole", "gptq")
    command = ["gptq", "--model", model, "--scheme", "{weights: {bits: 3, group_size: 32}}", "--threads", 1]
    command += ["--tokens", tmp_path / "t.safetensors", "--samples", 48, "--sequence-length", 32, "--options", "{}"]
    command = [sys.executable, "-c", STOPPED, *map(str, [*command, "--output", tmp_path / "cut"])]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert list((tmp_path / "cut/training/blocks").glob(".streams.safetensors.tmp"))
    resumed, done = run("cut", "gptq")
    assert done == [2, 3] and resumed["checkpoint_sha256"] == whole["checkpoint_sha256"]


def test_other_options_start_anew(run):
    run("cut", "gptq", killed_after=2)
    changed, done = run("cut", "gptq", "{damp: 0.05}")
    assert done == list(range(BLOCKS))
    assert changed["checkpoint_sha256"] == run("whole", "gptq", "{damp: 0.05}")[0]["checkpoint_sha256"]


def test_a_transform_keeps_nothing(run, tmp_path):
    """Its blocks do not become quantized, and what it has changed of one depends on the others."""
    run("awq", "awq", killed_after=2)
    assert not (tmp_path / "awq/training/blocks").exists()
