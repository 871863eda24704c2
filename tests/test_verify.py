"""`python -m reports.verify`: a tree of the smoke run has no deviation; whatever is changed in it is named with its file."""

import json
import random
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.core.formats import make
from methods.core.job.files import RESIDUALS, checkpoint_sha256, read_json, write_json
from reports import verify as command
from reports.verify import verify
from tests import faults
from tests.conftest import flip

pytestmark = pytest.mark.workflow
GPTQ, RTN = "micro/w2-g64/gptq/seed0", "micro/w2-g64/rtn/seed0"
LATE, FULL = "micro/w2-g64/lr_qat-from-gptq/seed0-tokens32768", "micro/unquantized/full_precision/seed0"
MIXED, E2M1 = "micro/mixed3.25-g64/rtn/seed0", "micro/e2m1-g64/rtn/seed0"
CELLS = (FULL, GPTQ, RTN, LATE, MIXED, E2M1)
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def tree(smoke, tmp_path):
    """Some cells of the smoke run with their matrix.json and what they were made of."""
    source, folder = smoke / "results/smoke", tmp_path / "results/smoke"
    for path in CELLS:
        shutil.copytree(source / path, folder / path)
    for path in ("text.json", "micro/mixed3.25-g64/allocation.json"):
        shutil.copy(source / path, folder / path)
    matrix = read_json(source / "matrix.json")
    write_json(folder / "matrix.json", matrix | {"cells": [c for c in matrix["cells"] if c["path"] in CELLS]})
    for name in ("text", "tokens/micro", "models/micro", "reference", "tasks"):
        shutil.copytree(smoke / "resources" / name, tmp_path / "resources" / name)
    return folder


def edit(path, change):
    """Change what a JSON file says."""
    value = read_json(path)
    change(value)
    write_json(path, value)


def edit_tensors(cell, change):
    """Change a checkpoint's tensors, and then every record of its hash, so that only the tensors tell."""
    path = cell / "checkpoint/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    before, after = read_json(cell / "run.json")["checkpoint_sha256"], checkpoint_sha256(cell / "checkpoint")
    for file in (cell / "run.json", *cell.glob("evals/*.json")):
        write_json(file, json.loads(json.dumps(read_json(file)).replace(before, after)))


def reword(path, old, new):
    """Change a text file, and not its hash."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(a, b):
    a.rename(a.with_name("other"))
    b.rename(a)
    a.with_name("other").rename(b)


def not_a_number(tensors):
    tensors[f"{LAYER}.weight_scale"][0, 0] = float("nan")


def zero(tensors):
    tensors[f"{LAYER}.weight_scale"][0, 0] = 0


def negative(tensors):
    tensors[f"{LAYER}.weight_scale"][0, 0] *= -1


def infinite(tensors):
    tensors["model.norm.weight"][0] = float("inf")


def no_code(tensors):
    """-8, for which E2M1 has no level."""
    form, name = make("e2m1", 4, 64), f"{LAYER}.weight_packed"
    shape = torch.Size(tensors[f"{LAYER}.weight_shape"].tolist())
    codes = form.unpack(tensors[name], shape)
    codes[0, 0] = -8
    tensors[name] = form.pack(codes)


def wider(tensors):
    """Codes in twice the bits."""
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"].repeat(1, 2)


def of_tensors(cell, change, found):
    """A change of a checkpoint's tensors, and what verification finds."""
    return lambda t: edit_tensors(t / cell, change), f"{cell}/checkpoint/model.safetensors: {found}"


def set_metric(name, value):
    return lambda result: result["metrics"][name].update(value=value)


RUN = "run.json"
CHANGES = {
    "a byte of a checkpoint": (lambda t: flip(t / RTN / "checkpoint/model.safetensors"), f"{RTN}/checkpoint: its hash"),
    "a checkpoint cut short": (
        lambda t: truncate(t / RTN / "checkpoint/model.safetensors"),
        f"{RTN}/checkpoint/model.safetensors: it cannot be read",
    ),
    "checkpoints of each other": (
        lambda t: swap(t / RTN / "checkpoint", t / GPTQ / "checkpoint"),
        f"{RTN}/checkpoint: its hash is not that of run.json",
    ),
    "a configuration of a checkpoint": (
        lambda t: edit(t / RTN / "checkpoint/config.json", lambda c: c.update(rms_norm_eps=0.1)),
        f"{RTN}/checkpoint: its hash",
    ),
    "a byte of residuals": (lambda t: flip(t / GPTQ / "checkpoint" / RESIDUALS), f"{RESIDUALS}: its hash"),
    "a scale that is no number": of_tensors(RTN, not_a_number, f"{LAYER}.weight_scale has values that are not finite"),
    "a scale of zero": of_tensors(RTN, zero, f"{LAYER}.weight_scale has scales of zero"),
    "a negative scale, where levels are the same on both sides": of_tensors(
        E2M1, negative, f"{LAYER}.weight_scale has negative scales"
    ),
    "a weight that is infinite": of_tensors(FULL, infinite, "model.norm.weight has values that are not finite"),
    "a code of no level": of_tensors(E2M1, no_code, f"{LAYER}.weight_packed has codes that are none of e2m1"),
    "codes in more bits": (
        lambda t: edit_tensors(t / RTN, wider),
        f"{RTN}/checkpoint: {LAYER} takes 208,896 bits, but 110,592 by its scheme",
    ),
    "bits per weight": (
        lambda t: edit(t / MIXED / "evals/footprint.json", set_metric("bits_per_weight", 3.0)),
        f"{MIXED}/evals/footprint.json: bits_per_weight is 3.0, but 3.2",
    ),
    "bits of another allocation": (
        lambda t: edit(t / "micro/mixed3.25-g64/allocation.json", lambda a: a["layers"][0].update(bits=8)),
        f"{MIXED}/run.json: its bits are not those of .*allocation.json",
    ),
    "a result of another checkpoint": (
        lambda t: shutil.copy(t / RTN / "evals/perplexity.json", t / GPTQ / "evals/perplexity.json"),
        f"{GPTQ}/evals/perplexity.json: it is of another checkpoint",
    ),
    "a perplexity": (
        lambda t: edit(t / RTN / "evals/perplexity.json", set_metric("perplexity", 20.0)),
        f"{RTN}/evals/perplexity.json: perplexity is 20.0, but its items give [0-9.]+",
    ),
    "a score": (
        lambda t: edit(t / RTN / "evals/mmlu.json", set_metric("mmlu_0shot", 0.9)),
        f"{RTN}/evals/mmlu.json: mmlu_0shot is 0.9, but its items give 0",
    ),
    "a number of items": (
        lambda t: edit(t / RTN / "evals/zero_shot.json", lambda r: r.update(n=79)),
        f"{RTN}/evals/zero_shot.parquet: it has 80 rows, but zero_shot.json has 79 items",
    ),
    "a byte of items": (
        lambda t: flip(t / RTN / "evals/mmlu.parquet"),
        f"{RTN}/evals/mmlu.parquet: its hash is not that in mmlu.json",
    ),
    "what a result says of its time": (
        lambda t: reword(t / RTN / "evals/mmlu.json", '"seconds": ', '"seconds": 1'),
        f"{RTN}/evals/mmlu.json: it cannot be read: .*changed or damaged since it was written",
    ),
    "what a run says of its time": (
        lambda t: reword(t / RTN / RUN, '"total": ', '"total": 1'),
        f"{RTN}/run.json: it cannot be read: .*changed or damaged since it was written",
    ),
    "a result without a seal": (
        lambda t: reword(t / RTN / "evals/mmlu.json", '"seal"', '"seam"'),
        f"{RTN}/evals/mmlu.json: it cannot be read: .*has no 'seal'",
    ),
    "losses": (
        lambda t: flip(t / LATE / "training/metrics.jsonl"),
        f"{LATE}/training/metrics.jsonl: its hash is not that in .*{LATE}/run.json",
    ),
    "an evaluation that has not ended": (
        lambda t: (t / RTN / "evals/done.json").unlink(),
        f"{RTN}/evals/done.json: there is none, the evaluations have not ended",
    ),
    "a configuration of the model": (
        lambda t: flip(t.parents[1] / "resources/models/micro/config.json"),
        "resources/models/micro: its config_sha256 is not that of its manifest",
    ),
    "the tokenizer of a checkpoint": (
        lambda t: flip(t / RTN / "checkpoint/tokenizer.json"),
        f"{RTN}/checkpoint: its hash",
    ),
    "a byte of benchmark items": (
        lambda t: flip(next((t.parents[1] / "resources/tasks").glob("*/piqa/validation.parquet"))),
        "resources/tasks/.*/piqa/validation.parquet: its hash is not that in .*piqa/task.json",
    ),
    "items cut short": (
        lambda t: truncate(t / RTN / "evals/mmlu.parquet"),
        f"{RTN}/evals/mmlu.parquet: it cannot be read: ArrowInvalid",
    ),
    "no items": (lambda t: (t / RTN / "evals/mmlu.parquet").unlink(), f"{RTN}/evals/mmlu.parquet: it cannot be read"),
    "a result cut short": (
        lambda t: truncate(t / RTN / "evals/mmlu.json"),
        f"{RTN}/evals/mmlu.json: it cannot be read: ValueError: .* is not valid JSON",
    ),
    "another protocol": (
        lambda t: edit(t / RTN / "evals/perplexity.json", lambda r: r.update(protocol="mine")),
        f"{RTN}/evals/perplexity.json: perplexity of micro is mine, but gptq-256/squad",
    ),
    "other options of an evaluation": (
        lambda t: edit(t / RTN / "evals/mmlu.json", lambda r: r["options"].update(limit=5)),
        f"{RTN}/evals/mmlu.json: its options are not those of matrix.json",
    ),
    "other options of a method": (
        lambda t: edit(t / RTN / RUN, lambda r: r["steps"][0]["options"].update(norm=2.0)),
        f"{RTN}/run.json: its checkpoint was made with another configuration",
    ),
    "a start from another checkpoint": (
        lambda t: edit(t / LATE / RUN, lambda r: r["steps"][0].update(checkpoint_sha256="0" * 64)),
        f"{LATE}/run.json: it started from another checkpoint than that of .*{GPTQ}",
    ),
    "another model": (
        lambda t: edit(t / RTN / RUN, lambda r: r["model"].update(sha256="0" * 64)),
        f"{RTN}/run.json: the model is not that of .*models/micro/manifest.json",
    ),
    "a byte of the model": (
        lambda t: flip(t.parents[1] / "resources/models/micro/model.safetensors"),
        "resources/models/micro: its sha256 is not that of its manifest",
    ),
    "a byte of tokens": (
        lambda t: flip(t.parents[1] / "resources/tokens/micro/squad.safetensors"),
        f"{RTN}/evals/perplexity.json: its data are not those of .*squad.safetensors",
    ),
    "a byte of calibration tokens": (
        lambda t: flip(t.parents[1] / "resources/tokens/micro/calibration.safetensors"),
        f"resources/tokens/micro/calibration.safetensors: it is not what .*{GPTQ}/run.json says that it has read",
    ),
    "half of the calibration tokens": (
        lambda t: truncate(t.parents[1] / "resources/tokens/micro/calibration.safetensors"),
        "resources/tokens/micro/calibration.safetensors: it cannot be read",
    ),
    "a document": (
        lambda t: flip(t.parents[1] / "resources/text/training/documents.jsonl"),
        "resources/text/training/documents.jsonl: its hash is not that in .*text.json",
    ),
    "a shared document": (
        lambda t: edit(
            t.parents[1] / "resources/text/training/manifest.json",
            lambda m: m["document_sha256"].append(
                read_json(t.parents[1] / "resources/text/squad/manifest.json")["document_sha256"][0]
            ),
        ),
        "text.json: datasets training and squad share 1 documents",
    ),
    "a text that was not checked": (
        lambda t: edit(t / "text.json", lambda texts: texts.pop("calibration")),
        f"{GPTQ}/run.json: the text calibration that it read is not that of .*text.json",
    ),
    "no run": (lambda t: (t / RTN / RUN).unlink(), f"{RTN}/run.json: there is none, the cell has not run"),
    "no result": (lambda t: (t / RTN / "evals/mmlu.json").unlink(), f"{RTN}/evals/mmlu.json: there is none"),
    "a failure": (
        lambda t: write_json(t / RTN / "evals/mmlu.failed.json", {"error": "x"}),
        f"{RTN}/evals/mmlu.json: the evaluation failed, see .*mmlu.failed.json",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_named_with_its_file(tree, change):
    corrupt, message = CHANGES[change]
    corrupt(tree)
    v = verify(tree)
    found = [*v.missing, *v.deviations]
    assert any(re.search(message, each) for each in found), found


def test_a_tree_that_nobody_changed_has_no_deviation_and_is_left_as_it_is(tree, monkeypatch, capsys):
    files = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tree.parents[1].rglob("*")}
    monkeypatch.setattr(sys, "argv", ["verify", str(tree)])
    command.main()
    said = capsys.readouterr().out
    assert "no deviation in 4 texts, 1 model, 6 runs, 36 results" in said and "6 checkpoints" in said, said
    assert files == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tree.parents[1].rglob("*")}
    flip(tree / RTN / "checkpoint/model.safetensors")
    with pytest.raises(
        SystemExit, match=r"(?s)checkpoint: its hash is not that of run.json.*: \d deviations? in"
    ) as error:
        command.main()
    assert isinstance(error.value.code, str)  # Python prints it, and the exit code is 1


def test_what_was_deleted_to_save_space_is_counted(tree):
    shutil.rmtree(tree / RTN / "checkpoint")
    shutil.rmtree(tree / GPTQ / "checkpoint/residuals")
    shutil.rmtree(tree.parents[1] / "resources")
    v = verify(tree)
    assert not v.missing and not v.deviations
    assert "5 checkpoints" in v.summary()
    left = v.summary().partition("not checked, since they are not there: ")[2]
    assert "1 checkpoint" in left and "1 residual" in left and "4 texts" in left and "1 model" in left


def test_a_report_says_whether_it_is_verified(smoke):
    lines = (smoke / "reports/summary.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("- verified: no deviation in")]
    assert "`python -m reports.verify results/smoke` reads the checkpoints, too" in line


def test_the_fault_harness_misses_nothing_unless_the_hashes_are_not_checked(tree, monkeypatch):
    """Random damage to the checkpoints of the tree is named; with the check of their hashes taken out it is not."""
    monkeypatch.setattr(faults, "CORRUPTIBLE", ("results/smoke/micro/*/*/*/checkpoint/config.json",))
    root = tree.parent.parent
    found, missed = faults.with_corruptions(root, 6, random.Random(1))
    assert found.total() == 6 and not missed
    monkeypatch.setattr(command, "_checkpoint", lambda *arguments: None)
    found, missed = faults.with_corruptions(root, 6, random.Random(1))
    assert not found and len(missed) == 6
