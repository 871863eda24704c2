"""What nobody wishes for a job: a disk that is full or read-only, too little memory, useless weights and texts, another job
at the same output. And that the fault harness (tests/faults.py) sees the damage once a protection is taken out.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

import evals.__main__
import methods.__main__
from methods.core.job.files import ROOT, read_json
from tests import faults
from tests.conftest import described

SCHEME = "{weights: {bits: 3, group_size: 64}}"
# Runs a module in other circumstances, which are functions that replace those of files.py: its writes are not atomic, it does
# not lock, or it stops when its checkpoint is written and not yet in its place. Or it may have 300 MiB and no more.
PLANTED = """
import os, resource, runpy, signal, sys
from contextlib import contextmanager
from methods.core.job import files

atomic_path = files.atomic_path

@contextmanager
def in_place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path

@contextmanager
def stopping(path):
    with atomic_path(path) as temporary:
        yield temporary
        if path.name == "checkpoint":
            os.kill(os.getpid(), signal.SIGSTOP)

planted = {"in place": ("atomic_path", in_place), "no lock": ("try_lock", lambda path: open(path, "a+")),
           "stops": ("atomic_path", stopping)}
names = [name for name in sys.argv.pop(1).split(", ") if name]
vars(files).update(planted[name] for name in names if name in planted)
if "little memory" in names:
    import methods.core.step.run, transformers.models.llama.modeling_llama
    with open("/proc/self/status") as file:
        has = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (has + 300 * 2**20,) * 2)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def arguments_of(model, output, *more, method="rtn"):
    words = [method, "--model", model, "--scheme", SCHEME, "--threads", 1, "--output", output, *more]
    return [str(word) for word in words]


def here(*arguments, **kwargs):
    """Run a job in this process; whether it ended well."""
    try:
        methods.__main__.main(arguments_of(*arguments, **kwargs))
    except SystemExit:
        return False
    return True


def command(*arguments, planted="", **kwargs):
    return [sys.executable, "-c", PLANTED, planted, "methods", *arguments_of(*arguments, **kwargs)]


def start(*arguments, **kwargs):
    return subprocess.Popen(command(*arguments, **kwargs), cwd=ROOT, stderr=subprocess.PIPE, text=True)


@contextmanager
def ending(process):
    """A process that is killed if the test fails meanwhile, as it may be stopped, or wait for one that is."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def text(folder, ids, *, samples, sequence_length):
    """The arguments that give a job these tokens."""
    save_file({"input_ids": ids.int()}, folder / "t.safetensors", metadata={"dataset": "text"})
    return ["--tokens", folder / "t.safetensors", "--samples", samples, "--sequence-length", sequence_length]


def run(*arguments, **kwargs):
    limit = kwargs.pop("limit", None)
    return subprocess.run(
        command(*arguments, **kwargs),
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit and (lambda: resource.setrlimit(*limit)),
    )


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    """run.json of a job that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "results/cell"
    assert not run(tiny, output).returncode
    return read_json(output / "run.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
@pytest.mark.parametrize(("options", "message"), [("size=32k", "No space left"), ("ro", "Read-only file system")])
def test_a_disk_that_takes_nothing(tiny, tmp_path, result, options, message):
    output = tmp_path / "results/cell"
    with faults.disk(output, options):
        done = run(tiny, output)
        assert done.returncode == 1 and message in done.stderr
        assert not (output / "checkpoint").exists() and not (output / "run.json").exists()
        assert not faults.broken(tmp_path)
    assert not run(tiny, output).returncode
    assert read_json(output / "run.json")["checkpoint_sha256"] == result["checkpoint_sha256"]


def test_too_little_memory(tiny, tmp_path):
    """Enough to import torch, not for a step of 262,144 tokens."""
    tokens = text(tmp_path, torch.randint(0, 256, (2**18,)), samples=1024, sequence_length=256)
    few = {"method": "full_qat", "planted": "little memory"}
    done = run(tiny, tmp_path / "cell", *tokens, "--batch-size", 1024, **few)
    assert done.returncode == 1 and re.search("memory|allocate", read_json(tmp_path / "cell/failed.json")["error"]), (
        done.stderr
    )
    assert not (tmp_path / "cell/checkpoint").exists()


@pytest.mark.parametrize("planted", ["", "in place"])
def test_a_file_that_cannot_be_written_to_its_end_is_not_there(tiny, tmp_path, planted):
    """As on a full disk, the checkpoint is cut off. Without atomic writes half of it is there, and the harness says so."""
    output = tmp_path / "results/cell"
    done = run(tiny, output, planted=planted, limit=(resource.RLIMIT_FSIZE, (40_000,) * 2))
    assert done.returncode == 1 and "File too large" in read_json(output / "failed.json")["error"]
    found = faults.broken(tmp_path)
    if planted:
        assert found == ["results/cell/checkpoint: it is not a whole checkpoint"]
    else:
        assert not found and not (output / "checkpoint").exists()


@pytest.mark.parametrize("planted", ["", "no lock"])
def test_a_job_that_outlived_its_run_and_its_successor(tiny, tmp_path, result, planted):
    """The first stops in the middle, as one on a slow disk does. The second waits for it; without a lock it takes the files
    of the first away, and the first ends with an error."""
    output = tmp_path / "results/cell"
    with ending(start(tiny, output, planted=f"stops, {planted}")) as first:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        with ending(start(tiny, output, planted=planted)) as second:
            if planted:
                assert second.wait() == 0
            else:
                assert any(f"waiting for process {first.pid} on " in line for line in second.stderr)
            first.send_signal(signal.SIGCONT)
            assert "FileNotFoundError" in first.stderr.read() if planted else first.wait() == 0
            assert second.wait() == 0
    assert read_json(output / "run.json")["checkpoint_sha256"] == result["checkpoint_sha256"]


@pytest.fixture
def spoilt(tiny, tmp_path):
    """A function: a copy of the tiny model with a change to the tensors of its first MLP."""

    def spoil(change):
        shutil.copytree(tiny, tmp_path / "spoilt")
        tensors = load_file(tmp_path / "spoilt/model.safetensors")
        change(tensors["model.layers.0.mlp.up_proj.weight"])
        save_file(tensors, tmp_path / "spoilt/model.safetensors", metadata={"format": "pt"})
        return described(tmp_path / "spoilt")

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(spoilt, tmp_path, value):
    def change(weight):
        weight[3, 5] = value

    model = spoilt(change)
    assert not here(model, tmp_path / "cell")
    error = read_json(tmp_path / "cell/failed.json")["error"]
    assert error == f"ValueError: {model}: weights that are not finite in model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("method", ["rtn", "gptq", "qronos", "auto_round", "lr_qat", "dl_qat", "full_qat", "peqa"])
def test_dead_columns_and_a_text_of_one_token(spoilt, tmp_path, method):
    """Columns and a whole row of zeros, and a Hessian of rank one: the result is finite."""

    def change(weight):
        weight[:, 5], weight[7] = 0, 0

    model = spoilt(change)
    tokens = text(tmp_path, torch.full((2**12,), 65), samples=16, sequence_length=32)
    options = ["--options", "{steps: 4}"] if method == "auto_round" else []
    assert here(model, tmp_path / "cell", *tokens, *options, method=method)
    tensors = load_file(tmp_path / "cell/checkpoint/model.safetensors")
    scales = [tensor.float() for name, tensor in tensors.items() if name.endswith("scale")]
    assert all(scale.isfinite().all() and (scale != 0).all() for scale in scales)
    errors = [row["weight_error"] for row in read_json(tmp_path / "cell/run.json")["layers"]]
    assert all(0 < error < 1 for error in errors), errors


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(spoilt, tmp_path):
    model = spoilt(lambda weight: weight.fill_(3e38))  # finite, as their products are not
    tokens = text(tmp_path, torch.randint(0, 256, (2**12,)), samples=16, sequence_length=32)
    assert not here(model, tmp_path / "cell", *tokens, method="peqa")
    error = read_json(tmp_path / "cell/failed.json")["error"]
    assert "at step 0 of 4" in error and "lower the learning rate" in error
    assert not (tmp_path / "cell/checkpoint").exists()


def test_a_result_that_was_cut_off_is_made_again(tiny, tmp_path):
    """What a full disk or a crash of the machine left of an earlier result is no result."""
    assert here(tiny, tmp_path / "cell")
    evaluate = [
        "{footprint: {}}",
        "--checkpoint",
        str(tmp_path / "cell/checkpoint"),
        "--output",
        str(tmp_path / "evals"),
    ]
    evals.__main__.main(evaluate)
    path = tmp_path / "evals/footprint.json"
    metrics = read_json(path)["metrics"]
    path.write_text(path.read_text()[:100])
    evals.__main__.main(evaluate)
    assert json.loads(path.read_text())["metrics"] == metrics
