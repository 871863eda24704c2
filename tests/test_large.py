"""Models larger than memory: what a step and an evaluation hold beyond the files does not grow with the number of blocks, and
the numbers are those of a model that fits."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from methods import peqa, rtn
from methods.__main__ import main
from methods.core.job.files import ROOT, read_json, write_json
from methods.core.job.log import RunLog
from methods.core.model import layers
from methods.core.model.checkpoint import load_model
from methods.core.scales import rounded_to_nearest
from methods.core.scheme import Scheme
from methods.core.step import run
from tests.conftest import SHAPE, described, prepared

BLOCKS = 64
WIDTHS = {"hidden_size": 384, "intermediate_size": 512, "initializer_range": 0.05}
# glibc returns what is freed to the system; and memory of the host is measured.
SURROUNDINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "PTQAT_DEVICE": "cpu"}
# Runs a module, with every model a large one or none, and prints the most bytes that it held beyond those of Python and its
# libraries. Pages of files are not among them: the kernel takes them back when it needs them.
MEASURED = """
import runpy, sys, threading, time
import torch
import evals.perplexity, methods.core.step.run
from methods.core.job import runtime, saves
from methods.core.model import layers, checkpoint

runtime._keep_freed_memory = lambda: None
layers.LARGEST_EXPANDED, saves.SECONDS, checkpoint.LARGEST_FILE = float(sys.argv.pop(1)), 0, 10**7
saves.SHARE = float("inf")

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

checkpoint.load_model(sys.argv.pop(1), torch.float32)  # what libraries are imported for it
start = most = held()
ended = False

def watch():
    global most
    while not ended:
        most = max(most, held())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
finally:
    ended = True
    watcher.join()
    print(most - start)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return many_blocks(tmp_path_factory.mktemp("large"))


def many_blocks(folder):
    """A model of many blocks in a folder beside tokens for it. It is in float32, in which any machine computes it."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | WIDTHS, num_hidden_layers=BLOCKS)
    ids = torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0)).int()
    save_file({"input_ids": ids}, folder / "t.safetensors", metadata={"dataset": "text", "text_sha256": "0" * 64})
    model = prepared(LlamaForCausalLM(config), folder / "model")
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    write_json(model / "config.json", read_json(model / "config.json") | {"dtype": "float32"})
    return described(model)


def measured(model, large, *command):
    """The bytes that a command held."""
    words = [sys.executable, "-c", MEASURED, 0 if large else 1e12, model, *command]
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=os.environ | SURROUNDINGS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def rounded(model, large, output, method="rtn", *more):
    """The bytes that a step held."""
    scheme, options = "{weights: {bits: 4, group_size: 64}}", "{scale: minmax}"
    arguments = ["--model", model, "--scheme", scheme, "--options", options, "--threads", 1, "--output", output, *more]
    return measured(model, large, "methods", method, *arguments)


def test_memory_of_a_step_is_that_of_a_few_blocks(model, tmp_path):
    size = (model / "model.safetensors").stat().st_size
    held = {large: rounded(model, large, tmp_path / str(large)) for large in (True, False)}
    hashes = {read_json(tmp_path / str(large) / "run.json")["checkpoint_sha256"] for large in held}
    assert len(hashes) == 1 and len(list((tmp_path / "True/checkpoint").glob("*.safetensors"))) > 3
    assert held[True] < size / 4 < held[False]


def evaluated(model, large, checkpoint, output):
    """The bytes that an evaluation held."""
    text = {"data": str(model.parent / "t.safetensors"), "options": {"window": 32, "max_windows": 4}}
    arguments = [json.dumps({"perplexity": text}), "--checkpoint", checkpoint, "--threads", 1, "--output", output]
    return measured(model, large, "evals", *arguments)


def test_memory_of_an_evaluation_is_that_of_packed_codes(model, tmp_path):
    size = (model / "model.safetensors").stat().st_size
    rounded(model, True, tmp_path)
    held = {large: evaluated(model, large, tmp_path / "checkpoint", tmp_path / str(large)) for large in (True, False)}
    packed, kept = (read_json(tmp_path / f"{large}/perplexity.json")["metrics"] for large in held)
    assert kept == packed
    assert held[True] < size / 2 < held[False]


def test_a_large_model_stays_packed(model, tmp_path, monkeypatch):
    """Its layers compute what the codes stand for, to the last bit what a smaller model's layers keep."""
    rounded(model, False, tmp_path)
    kept = layers.quantized_layers(load_model(tmp_path / "checkpoint", torch.float32))
    monkeypatch.setattr(layers, "LARGEST_EXPANDED", 1e6)
    packed = layers.quantized_layers(load_model(tmp_path / "checkpoint", torch.float32))
    assert all(layer.expanded is not None for layer in kept.values())
    assert all(layer.expanded is None for layer in packed.values()) and len(packed) == 7 * BLOCKS
    assert all(torch.equal(packed[name].weight, layer.weight) for name, layer in kept.items())


def test_a_large_model_that_was_trained_stays_packed(tiny, tmp_path, monkeypatch):
    """With the same codes: weights in full beside all the codes would not fit where the training did."""
    scheme = Scheme.from_dict("w4", {"weights": {"bits": 4, "group_size": 32}})
    tokens, trained = torch.arange(64).view(1, 1, 4, 16), []
    for number in (1e12, 0):
        monkeypatch.setattr(layers, "LARGEST_EXPANDED", number)
        log = RunLog(tmp_path / str(number))
        model = peqa.apply(load_model(tiny, torch.float32), scheme, peqa.Config(), tokens, log)
        trained.append(layers.quantized_layers(model))
    kept, packed = trained
    assert all(layer.expanded is not None for layer in kept.values())
    assert packed and all(layer.expanded is None for layer in packed.values())
    assert all(torch.equal(packed[name].weight, layer.weight) for name, layer in kept.items())


def test_a_step_loads_its_model_once(tiny, monkeypatch, tmp_path):
    """The errors of layers are from weights that are read one by one; a second model of 70B would be 140 GB."""
    loaded, load = [], run.load_model

    def counting(folder, dtype):
        loaded.append(folder)
        return load(folder, dtype)

    monkeypatch.setattr(run, "load_model", counting)
    command = ["rtn", "--model", tiny, "--scheme", "{weights: {bits: 4, group_size: 32}}", "--output", tmp_path / "rtn"]
    main([str(word) for word in command])
    assert loaded == [tiny] and all(row["weight_error"] > 0 for row in read_json(tmp_path / "rtn/run.json")["layers"])


def test_rounding_to_nearest_searches_on_the_device(tiny, monkeypatch, tmp_path):
    """The candidates for each group of a 70B model would take hours on the host."""
    monkeypatch.setattr("methods.rtn.device", lambda: torch.device("meta"))
    seen = []

    def rounded(weight, form, search):
        seen.append(weight.device.type)
        return rounded_to_nearest(torch.zeros(weight.shape), form, search)

    monkeypatch.setattr("methods.rtn.rounded_to_nearest", rounded)
    scheme = Scheme.from_dict("s", {"weights": {"bits": 4, "group_size": 32}})
    with contextlib.suppress(NotImplementedError):  # what is there has no data to bring back
        rtn.apply(load_model(tiny, torch.float32), scheme, rtn.Config(), None, RunLog(tmp_path))
    assert seen and set(seen) == {"meta"}
