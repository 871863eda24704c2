"""From a configuration to the cells of the matrix. Everything that can be wrong is found here, before any job starts.

Imports neither torch nor transformers: Snakemake runs this every time it starts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from methods.core.job import registry
from methods.core.job.options import build_config, choose
from methods.core.scheme import Scheme, WeightScheme
from workflow.prepare.tasks import EMBEDDED as EMBEDDED_TASKS

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
EMBEDDED = "resources/embedded/"  # made by a rule, so these files need not exist yet
GENERATED = "generated"  # the name of the tokens that a model generates itself, where datasets have theirs
LOCAL_LOADERS = ("json", "text", "parquet", "csv", "arrow")


class ConfigError(ValueError):
    """A mistake in the configuration; the message names the place, the value and the valid choices."""


@dataclass(frozen=True, order=True)
class Cell:
    """One job of quantization: a checkpoint and its evaluations."""

    model: str
    scheme: str
    method: str
    seed: int

    @property
    def path(self) -> str:
        return f"{self.model}/{self.scheme}/{self.method}/seed{self.seed}"


@dataclass(frozen=True)
class Matrix:
    """A checked configuration and what the rules ask of it."""

    config: dict[str, Any]
    cells: tuple[Cell, ...]

    @property
    def results(self) -> str:
        return f"results/{self.config['name']}"

    @cached_property
    def jobs(self) -> tuple[Cell, ...]:
        """The cells and those that they start from."""
        return with_starts(self.config, self.cells)

    @property
    def data(self) -> set[str]:
        """The kinds of tokens that the methods in use receive, and the allocations."""
        return {data_of(self.config, c.method) for c in self.jobs} | ({"calibration"} if self.mixed else set())

    @property
    def mixed(self) -> set[str]:
        """Names of the schemes in use whose layers differ in their bits."""
        schemes = {c.scheme for c in self.jobs}
        return {name for name in schemes if "average_bits" in self.config["schemes"][name].get("weights", {})}

    def allocation(self, model: str, scheme: str) -> str | None:
        """Path of the bits of each layer, for a scheme that does not give all layers the same."""
        return f"{self.results}/{model}/{scheme}/allocation.json" if scheme in self.mixed else None

    def sensitivity(self, scheme: str) -> str:
        """Name of what errors in a model's layers cost: all that it depends on but the model. Budgets share it."""
        w = Scheme.from_dict(scheme, self.config["schemes"][scheme]).weights
        groups = [w.group_size or "channel", w.other_group_size]
        grids = f"w{'.'.join(map(str, w.widths))}-g{'.'.join(str(g) for g in groups if g)}-{w.scale_dtype}"
        tokens = self.config["allocation"]
        dataset = self.config["calibration"]["dataset"]
        return f"{w.sensitivity}-{grids}-{dataset}-{tokens['samples']}x{tokens['sequence_length']}"

    @property
    def trained_on(self) -> set[str]:
        """Names of the datasets that some model in use is trained on from nothing."""
        models = [self.config["models"][c.model] for c in self.cells]
        return {m["train"]["dataset"] for m in models if "train" in m}

    @property
    def evaluation_datasets(self) -> list[str]:
        return [entry["dataset"] for entry in self.config["evaluations"].values() if "dataset" in entry]

    @cached_property
    def datasets(self) -> list[str]:
        """The datasets in use, in the order of the configuration."""
        used = set(self.evaluation_datasets)
        used |= {self.config[data]["dataset"] for data in self.data & {"calibration", "training"}}
        used |= self.trained_on
        return [name for name in self.config["datasets"] if name in used]

    @cached_property
    def references(self) -> dict[str, str]:
        """Files of what the full-precision models predict, by a name that says on what, and for which evaluation."""
        found = {}
        for name, entry in self.config["evaluations"].items():
            if evaluation_declaration(name).of.given == "reference":
                options = "-".join(f"{k}{v}" for k, v in self.evaluation_options(name).items())
                found[name] = f"{entry['dataset']}-{options}"
        return found

    def evaluation_options(self, name: str) -> dict[str, Any]:
        """All options of an evaluation, defaults included."""
        return asdict(evaluation_config(self.config, name))

    def evaluation_data(self, name: str, model: str) -> str | list[str] | None:
        """Path or paths of what an evaluation of a model's checkpoints is given."""
        entry = self.config["evaluations"][name]
        data = evaluation_declaration(name).of.given
        if data == "tasks":
            return [f"resources/tasks/{entry['tasks']}/{task}" for task in tasks_of(self.config, name)]
        if data == "reference":
            return f"resources/reference/{model}/{self.references[name]}.safetensors"
        return self.token_file(model, entry["dataset"]) if data == "tokens" else None

    def evaluation_arguments(self, model: str) -> str:
        """What `python -m evals` is told to do with a model's checkpoints, as JSON."""
        entries = {}
        for name in self.config["evaluations"]:
            entries[name] = {"options": self.evaluation_options(name)}
            if data := self.evaluation_data(name, model):
                entries[name]["data"] = data
        return json.dumps(entries)

    def module(self, method: str) -> str:
        """Name of the module in methods/ that a method's entry uses."""
        return module_of(self.config, method)

    def options(self, method: str) -> dict[str, Any]:
        """All options of a method's entry, defaults included."""
        given = self.config.get("methods", {}).get(method, {}).get("options", {})
        return asdict(build_config(declaration_of(self.config, method).Config, given, f"method {method}"))

    def as_in_paper(self, method: str) -> bool | None:
        """Whether a method's entry has its paper's data, start and options, as far as its module knows; None if not."""
        declared, entry = declaration_of(self.config, method), self.config.get("methods", {}).get(method, {})
        if declared.of.paper is None:
            return None
        same = all(self.options(method)[name] == value for name, value in declared.of.paper.items())
        return same and "init_from" not in entry and entry.get("data", declared.of.reads) == declared.of.reads

    def cell_arguments(self, cell: Cell) -> dict[str, str]:
        """What `python -m methods` is told about a cell, as JSON where it is structured."""
        return {
            "cell": json.dumps(asdict(cell)),
            "scheme": json.dumps(self.config["schemes"][cell.scheme]),
            "options": json.dumps(self.options(cell.method)),
        }

    def model_spec(self, model: str) -> str:
        """What the preparing scripts are told about a model, as JSON; what only the report or the scheduler reads is not."""
        return json.dumps({k: v for k, v in self.config["models"][model].items() if k not in ("note", "side_by_side")})

    def start(self, cell: Cell) -> Cell | None:
        """The cell whose checkpoint this one starts from (`init_from`)."""
        return start_of(self.config, cell)

    def tokens(self, cell: Cell) -> str | None:
        """Name of the dataset whose tokens the cell's method receives."""
        data = data_of(self.config, cell.method)
        if data == "none":
            return None
        return GENERATED if data == "generated" else self.config[data]["dataset"]

    def token_file(self, model: str, dataset: str) -> str:
        """Path of a model's tokens. What it generates itself depends on the training budget, which is in the name."""
        if dataset == GENERATED:
            training, generation = self.config["training"], self.config["generation"]
            dataset += f"-{training['tokens']}x{training['sequence_length']}"
            dataset += f"-batch{generation['batch_size']}-seed{generation['seed']}"
        return f"resources/tokens/{model}/{dataset}.safetensors"

    def token_arguments(self, cell: Cell) -> list[str]:
        """How many tokens the cell's method receives and in which shape, as arguments of `python -m methods`."""
        data = data_of(self.config, cell.method)
        if data == "none":
            return []
        if data == "calibration":
            budget = self.config["calibration"]
            return ["--samples", str(budget["samples"]), "--sequence-length", str(budget["sequence_length"])]
        budget = self.config["training"]
        arguments = {
            "--samples": budget["tokens"] // budget["sequence_length"],
            "--sequence-length": budget["sequence_length"],
            "--batch-size": budget["batch_size"],
            "--accumulation": budget.get("accumulation", 1),
        }
        flags = ["--gradient-checkpointing"] if budget.get("gradient_checkpointing") else []
        return [str(word) for pair in arguments.items() for word in pair] + flags

    def cores(self, model: str, claimed: int) -> dict[str, int]:
        """Cores of a job: "threads" of the `claimed` ones of `snakemake --cores`, and the "torch_threads" it computes with.

        Torch processes that together have more threads than there are cores slow each other several-fold. So a model's
        jobs share the real cores among as many as may run `side_by_side`, one unless its entry says otherwise, and claim
        of Snakemake all that keeps others away. More than 16 cores hardly speed up one process.
        """
        real = available_cores()
        jobs = min(claimed, real, self.config["models"][model].get("side_by_side", 1))
        threads = math.ceil(claimed / jobs)
        if claimed <= real:
            threads = min(threads, 16)
        return {"threads": threads, "torch_threads": min(threads, real // jobs)}

    def to_json(self) -> dict[str, Any]:
        """What the report needs to know: the cells that there should be, and the configuration they come from."""
        cells = []
        for cell in self.cells:
            start = self.start(cell)
            cells.append(
                asdict(cell)
                | {"path": cell.path, "module": self.module(cell.method), "options": self.options(cell.method)}
                | {"dataset": self.tokens(cell), "init_from": start and start.method}
                | {"as_in_paper": self.as_in_paper(cell.method)}
            )
        evaluations = {name: self.evaluation_options(name) for name in self.config["evaluations"]}
        return {"name": self.config["name"], "cells": cells, "evaluations": evaluations, "config": self.config}


def load(config: dict[str, Any]) -> Matrix:
    """Check a configuration and multiply its matrix. ConfigError for the first mistake."""
    config = json.loads(json.dumps(config))  # plain dicts and lists, whatever Snakemake made of the YAML
    if isinstance(config.get("evaluations"), dict):
        # A configuration laid over another can add to its mappings only: null takes an evaluation out.
        config["evaluations"] = {name: entry for name, entry in config["evaluations"].items() if entry is not None}
    _check_schema(config)
    cells = _expand(config)
    _check_methods(config, cells)
    _check_evaluations(config)
    _check_group_sizes(config, cells)
    matrix = Matrix(config, cells)
    _check_sources(config, matrix)
    _check_overlap(config, matrix)
    return matrix


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_of(names) -> str:
    """A regular expression that matches just these names, or nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"


def module_of(config: dict[str, Any], method: str) -> str:
    return config.get("methods", {}).get(method, {}).get("use", method)


def declaration_of(config: dict[str, Any], method: str) -> registry.Declaration:
    return registry.declaration("methods", module_of(config, method))


def data_of(config: dict[str, Any], method: str) -> str:
    """The kind of tokens that a method's entry receives."""
    return config.get("methods", {}).get(method, {}).get("data") or declaration_of(config, method).of.reads


def evaluation_declaration(name: str) -> registry.Declaration:
    return registry.declaration("evals", name)


def evaluation_config(config: dict[str, Any], name: str) -> Any:
    options = config["evaluations"][name].get("options", {})
    return build_config(evaluation_declaration(name).Config, options, f"evaluation {name}")


def tasks_of(config: dict[str, Any], name: str) -> tuple[str, ...]:
    """The tasks or groups of lm-eval that an evaluation scores: its option `tasks`, or what it is named after."""
    return getattr(evaluation_config(config, name), "tasks", (name,))


def start_of(config: dict[str, Any], cell: Cell) -> Cell | None:
    """The cell whose checkpoint a cell starts from; a training control's has the scheme without weights."""
    method = config.get("methods", {}).get(cell.method, {}).get("init_from")
    if not method:
        return None
    if declaration_of(config, method).of.quantizes:
        return replace(cell, method=method)
    return replace(cell, method=method, scheme=unquantized_scheme(config))


def unquantized_scheme(config: dict[str, Any]) -> str:
    """Name of the scheme that quantizes nothing. ConfigError if there is none."""
    for name, spec in config["schemes"].items():
        if not spec:
            return name
    raise ConfigError("schemes: a method starts from a full-precision checkpoint, and no scheme is empty ({}) for that")


def with_starts(config: dict[str, Any], cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The cells, those they start from, those that these start from, and so on."""
    found = dict.fromkeys(cells)
    waiting = list(cells)
    while waiting:
        start = start_of(config, waiting.pop())
        if start and start not in found:
            found[start] = None
            waiting.append(start)
    return tuple(found)


def _check_schema(config: dict[str, Any]) -> None:
    schema = yaml.safe_load(SCHEMA.read_text())
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(config))
    if not errors:
        return
    error = jsonschema.exceptions.best_match(errors)
    where = ".".join(map(str, error.absolute_path)) or "the top level"
    if error.validator == "additionalProperties":
        valid = error.schema["properties"]
        for key in error.instance.keys() - valid.keys():
            with _place(where):
                choose(key, valid, "key")
    description = error.schema.get("description", "")
    raise ConfigError(f"{where}: {error.message}" + (f" ({description})" if description else ""))


class _place:
    """Turns a ValueError raised inside into a ConfigError that names the place in the configuration."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and issubclass(kind, ValueError) and not issubclass(kind, ConfigError):
            raise ConfigError(f"{self.where}: {error}") from None


def _expand(config: dict[str, Any]) -> tuple[Cell, ...]:
    names = registry.names("methods")
    for entry, spec in config.get("methods", {}).items():
        with _place(f"methods.{entry}"):
            choose(spec.get("use", entry), names, "method module (a file in methods/)")
    valid = {
        "models": config["models"],
        "schemes": config["schemes"],
        "methods": {*names, *config.get("methods", {})},
    }
    cells = []
    for i, entry in enumerate(config["matrix"]):
        for kind, choices in valid.items():
            with _place(f"matrix.{i}.{kind}"):
                for name in entry[kind]:
                    choose(name, choices, kind[:-1])
        product = itertools.product(entry["models"], entry["schemes"], entry["methods"], entry.get("seeds", [0]))
        cells += [Cell(*values) for values in product]
    return tuple(dict.fromkeys(cells))


def _check_methods(config: dict[str, Any], cells: tuple[Cell, ...]) -> None:
    for name in config.get("methods", {}):
        _check_init_from(config, name)
    jobs = with_starts(config, cells)
    options = {}
    for name in {*config.get("methods", {}), *(c.method for c in jobs)}:
        entry = config.get("methods", {}).get(name, {})
        with _place(f"methods.{name}.options"):
            declared = declaration_of(config, name)
            options[name] = build_config(declared.Config, entry.get("options", {}), f"method {name}")
        if "data" in entry and not declared.of.trains:
            raise ConfigError(
                f"methods.{name}.data: {module_of(config, name)!r} does not train, its data is {declared.of.reads}"
            )
    for cell in jobs:
        declared = declaration_of(config, cell.method)
        with _place(f"schemes.{cell.scheme}"):
            scheme = Scheme.from_dict(cell.scheme, config["schemes"][cell.scheme])
        if declared.of.quantizes != (scheme.weights is not None):
            raise ConfigError(
                f"matrix: method {cell.method!r} {'needs' if declared.of.quantizes else 'cannot have'} a scheme with "
                f"weights, but scheme {cell.scheme!r} {'has none' if declared.of.quantizes else 'has'}"
            )
        if declared.check:
            with _place(f"matrix: method {cell.method!r} with scheme {cell.scheme!r}"):
                declared.check(scheme, options[cell.method])


def _check_init_from(config: dict[str, Any], name: str) -> None:
    entries = config.get("methods", {})
    seen = [name]
    while start := entries.get(seen[-1], {}).get("init_from"):
        with _place(f"methods.{seen[-1]}.init_from"):
            choose(start, {*registry.names("methods"), *entries}, "method")
            if start in seen:
                raise ValueError(f"a circle: {' from '.join([*seen, start])}")
            if declaration_of(config, start).of.quantizes:
                if registry.CODES not in declaration_of(config, seen[-1]).of.takes:
                    able = [
                        m
                        for m in registry.names("methods")
                        if registry.CODES in registry.declaration("methods", m).of.takes
                    ]
                    raise ValueError(
                        f"this method cannot start from a checkpoint that is quantized; those that can: {', '.join(able)}"
                    )
                given = entries[seen[-1]].get("options", {})
                declared = declaration_of(config, seen[-1])
                build_config(declared.Config, given, f"method {seen[-1]}").require_defaults()
            elif not declaration_of(config, start).of.trains:
                raise ValueError(f"{start!r} is the model itself, which every method starts from anyway")
        seen.append(start)


def _check_evaluations(config: dict[str, Any]) -> None:
    key_of = {"tokens": "dataset", "reference": "dataset", "tasks": "tasks", "none": None}
    for name, entry in config["evaluations"].items():
        with _place(f"evaluations.{name}"):
            choose(name, registry.names("evals"), "evaluation (a file in evals/)")
            data = evaluation_declaration(name).of.given
            evaluation_config(config, name)
            for key in ("dataset", "tasks"):
                if (key in entry) != (key == key_of[data]):
                    raise ValueError(f"it takes no {key}" if key in entry else f"it needs the key {key}")
            for task in tasks_of(config, name) if entry.get("tasks") == "embedded" else ():
                choose(task, EMBEDDED_TASKS, "task with embedded items")


def _check_group_sizes(config: dict[str, Any], cells: tuple[Cell, ...]) -> None:
    for model, name in {(c.model, c.scheme) for c in cells}:
        scheme = Scheme.from_dict(name, config["schemes"][name])
        if scheme.weights is None:
            continue
        for width in _widths(config["models"][model]):
            with _place(f"schemes.{name}.weights with model {model!r}"):
                scheme.weights.group_size_for(width)
        if scheme.weights.mixed:
            with _place(f"schemes.{name}.weights with model {model!r}"):
                _check_average(scheme.weights, _widths(config["models"][model]))


def _check_average(weights: WeightScheme, widths: list[int]) -> None:
    """ValueError for an average that no layer, or every layer, would be within."""
    if not widths:
        return  # unknown before the model is there
    taken = [[weights.stored_bits(bits, 1, width) / width for bits in weights.widths] for width in widths]
    low, high = min(t[0] for t in taken), max(t[-1] for t in taken)
    if not low <= weights.average_bits < high:
        raise ValueError(
            f"average_bits {weights.average_bits:g} counts scales too: with choices {list(weights.choices)} a layer takes "
            f"from {low:g} to {high:g} bits per weight, and the average must lie between"
        )


def _widths(model: dict[str, Any]) -> list[int]:
    """Input widths of the model's linear layers as far as they are known without downloading anything."""
    if "linear_widths" in model:
        return model["linear_widths"]
    path = Path(model.get("path", "")) / "config.json"
    if not path.is_file():
        return []
    c = json.loads(path.read_text())
    heads = c.get("num_attention_heads", 1)
    widths = (
        c.get("hidden_size"),
        c.get("intermediate_size"),
        heads * (c.get("head_dim") or c.get("hidden_size", 0) // heads),
    )
    return sorted({w for w in widths if w})


def _check_sources(config: dict[str, Any], matrix: Matrix) -> None:
    for name, entry in [(n, e) for n, e in config["evaluations"].items() if "dataset" in e]:
        with _place(f"evaluations.{name}.dataset"):
            choose(entry["dataset"], config["datasets"], "dataset")
    if GENERATED in config["datasets"]:
        raise ConfigError(f"datasets.{GENERATED}: this name is kept for what a model generates itself")
    for section in ("calibration", "training"):
        with _place(f"{section}.dataset"):
            choose(config[section]["dataset"], config["datasets"], "dataset")
    step = (
        config["training"]["batch_size"]
        * config["training"].get("accumulation", 1)
        * config["training"]["sequence_length"]
    )
    if config["training"]["tokens"] % step:
        raise ConfigError(
            f"training.tokens: {config['training']['tokens']} is not a multiple of a step's {step} tokens"
        )
    for name in matrix.datasets:
        if config["datasets"][name]["path"] in LOCAL_LOADERS and not local_files(config["datasets"][name]):
            raise ConfigError(f"datasets.{name}: path {config['datasets'][name]['path']!r} needs data_files")
        for file in local_files(config["datasets"][name]):
            if not file.startswith(EMBEDDED) and not Path(file).exists():
                raise ConfigError(f"datasets.{name}.data_files: there is no file {file!r}")
    for name in {c.model for c in matrix.cells}:
        model = config["models"][name]
        if "train" in model:
            with _place(f"models.{name}.train.dataset"):
                choose(model["train"]["dataset"], config["datasets"], "dataset")
            continue
        path = model["path"]
        local = path.startswith(("/", "./", "../")) or Path(path).exists() or path.count("/") > 1
        needed = model.get("gguf_file", "config.json")
        if path.startswith(EMBEDDED):
            with _place(f"models.{name}.path"):
                choose(Path(path).name, config.get("packages", {}), "package")
        elif local and not (Path(path) / needed).is_file():
            raise ConfigError(f"models.{name}.path: there is no model folder {path!r} (a folder with {needed})")


def local_files(dataset: dict[str, Any]) -> list[str]:
    """Files on this machine that a dataset reads."""
    if dataset["path"] not in LOCAL_LOADERS:
        return []
    files = dataset.get("data_files", [])
    return [files] if isinstance(files, str) else files


def _check_overlap(config: dict[str, Any], matrix: Matrix) -> None:
    """What can be seen in the configuration alone; the documents themselves are compared once they have been read."""
    learned_from = {config[section]["dataset"] for section in ("calibration", "training")} | matrix.trained_on
    if both := learned_from & set(matrix.evaluation_datasets):
        raise ConfigError(
            f"dataset {min(both)!r} is used for evaluation and for calibration or training; they must differ"
        )
    for a, b in itertools.combinations(matrix.datasets, 2):
        x, y = config["datasets"][a], config["datasets"][b]
        if any(x.get(k) != y.get(k) for k in ("path", "name", "revision")):
            continue
        if x.get("split", "train") != y.get("split", "train"):
            continue
        files = [{f} if isinstance(f, str) else set(f) for f in (d.get("data_files", []) for d in (x, y))]
        if any(files) and not files[0] & files[1]:
            continue
        ranges = [d.get("hash_range", (0, 1)) for d in (x, y)]
        low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
        if low < high:
            raise ConfigError(
                f"datasets.{a} and datasets.{b} read the same source, and their hash_range overlaps in [{low}, {high}): "
                "calibration, training and evaluation text must be disjoint"
            )
