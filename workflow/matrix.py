"""The cells of a configuration's matrix, and what the rules need of each: paths, tokens, arguments of its command.

Neither torch nor transformers is imported, since Snakemake runs this every time it starts.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from methods.core.scheme import format_files
from workflow import checks
from workflow.configuration import Configuration, parse
from workflow.prepare import GENERATED
from workflow.recipes import Recipe, Step


@dataclass(frozen=True, order=True)
class Cell:
    """One checkpoint: a model to which a recipe was applied under a scheme, with a seed and, if it trains, a budget.

    method: the recipe's name. budget: tokens of each of its trainings; None if no step trains.
    """

    model: str
    scheme: str
    method: str
    seed: int
    budget: int | None = None

    @property
    def replicate(self) -> str:
        """Name of its folder among those of its method."""
        return f"seed{self.seed}" + (f"-tokens{self.budget}" if self.budget else "")

    @property
    def path(self) -> str:
        return f"{self.model}/{self.scheme}/{self.method}/{self.replicate}"

    @classmethod
    def at(cls, model: str, scheme: str, method: str, replicate: str) -> Cell:
        """The cell of a path's parts."""
        seed, _, budget = replicate.removeprefix("seed").partition("-tokens")
        return cls(model, scheme, method, int(seed), int(budget) if budget else None)


@dataclass(frozen=True)
class Matrix:
    """A checked configuration and its cells."""

    configuration: Configuration
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.configuration.name

    @property
    def results(self) -> str:
        return f"results/{self.name}"

    @cached_property
    def without_gpus(self) -> Matrix:
        """The same on a machine without a GPU."""
        models = {name: replace(model, on_cpu=True) for name, model in self.configuration.models.items()}
        return replace(self, configuration=replace(self.configuration, models=models))

    # Cells and their recipes

    def recipe(self, cell: Cell) -> Recipe:
        return self.configuration.methods[cell.method]

    def start(self, cell: Cell) -> Cell | None:
        """The cell whose checkpoint the last step of this one starts from. Schemes share it unless it depends on them."""
        start = self.recipe(cell).start
        if start is None:
            return None
        scheme = cell.scheme if start.needs_scheme else self.configuration.unquantized
        return replace(cell, scheme=scheme, method=start.name, budget=cell.budget if start.trains else None)

    def chain(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells of a recipe's first step, of its first two, ..., and the cell itself."""
        start = self.start(cell)
        return (*(self.chain(start) if start else ()), cell)

    def rounded_from(self, cell: Cell) -> Cell | None:
        """The cell whose checkpoint has the weights that the codes which a cell starts from were rounded from.

        None if the cell starts from ordinary weights, or if the codes were rounded from the model's own.
        """
        *before, _ = self.chain(cell)
        if not before or not self.recipe(before[-1]).quantizes:
            return None
        return next((each for each in reversed(before) if not self.recipe(each).quantizes), None)

    @cached_property
    def jobs(self) -> tuple[Cell, ...]:
        """The cells of the matrix and those that they start from."""
        return tuple(dict.fromkeys([*self.cells, *itertools.chain.from_iterable(map(self.chain, self.cells))]))

    def module(self, method: str) -> str:
        """Name of the module of a recipe's last step."""
        return self.configuration.methods[method].last.module

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models in use."""
        return tuple(dict.fromkeys(cell.model for cell in self.cells))

    @cached_property
    def mixed(self) -> tuple[str, ...]:
        """Names of the schemes in use whose layers differ in their bits, sorted."""
        return tuple(sorted({c.scheme for c in self.jobs if self.configuration.schemes[c.scheme].mixed}))

    def processes(self, cell: Cell) -> int:
        """How many processes share the tokens of the last step of a cell, each with a GPU of its own."""
        gpus = self.configuration.models[cell.model].gpus
        return max(1, gpus) if self.recipe(cell).last.of.divides else 1

    # Tokens

    @cached_property
    def datasets(self) -> list[str]:
        """Names of the datasets in use, in the order of the configuration."""
        config = self.configuration
        reads = {self.recipe(cell).last.reads for cell in self.jobs} | ({"calibration"} if self.mixed else set())
        used = {*self.evaluation_datasets, *self.trained_on}
        used |= {self._dataset(kind) for kind in reads & {"calibration", "training"}}
        return [name for name in config.datasets if name in used]

    @property
    def trained_on(self) -> set[str]:
        """Names of the datasets that a model in use is trained on from nothing."""
        return {name for model in self.models if (name := self.configuration.models[model].trained_on)}

    @property
    def evaluation_datasets(self) -> list[str]:
        return [entry.dataset for entry in self.configuration.evaluations.values() if entry.dataset]

    def tokens(self, cell: Cell) -> str | None:
        """Name of the tokens that the last step of a cell reads: a dataset's, or "generated"."""
        return self._dataset(self.recipe(cell).last.reads)

    def _dataset(self, reads: str) -> str | None:
        config = self.configuration
        datasets = {"calibration": config.calibration.dataset, "training": config.training.dataset}
        return (datasets | {"generated": GENERATED}).get(reads)

    @cached_property
    def generated(self) -> int:
        """How many tokens a model generates: as many as the largest budget reads, of which smaller ones read a part."""
        return max((cell.budget for cell in self.jobs if self.tokens(cell) == GENERATED), default=0)

    def token_file(self, model: str, dataset: str) -> str:
        """Path of a model's tokens. How many of them it generates itself is in the name."""
        if dataset == GENERATED:
            training, generation = self.configuration.training, self.configuration.generation
            dataset += f"-{self.generated}x{training.sequence_length}"
            dataset += f"-batch{generation.batch_size}-seed{generation.seed}"
        return f"resources/tokens/{model}/{dataset}.safetensors"

    def amount(self, cell: Cell) -> dict[str, int]:
        """How many tokens the last step of a cell reads and in which shape; empty if it reads none."""
        reads = self.recipe(cell).last.reads
        if reads == "none":
            return {}
        calibration, training = self.configuration.calibration, self.configuration.training
        if reads == "calibration":
            return {"samples": calibration.samples, "sequence_length": calibration.sequence_length}
        return {
            "samples": cell.budget // training.sequence_length,
            "sequence_length": training.sequence_length,
            "batch_size": training.batch_size,
            "accumulation": training.accumulation,
        }

    def token_arguments(self, cell: Cell) -> list[str]:
        """`amount` as arguments of `python -m methods`."""
        named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in self.amount(cell).items()]
        return list(itertools.chain.from_iterable(named))

    def saves_memory(self, cell: Cell) -> bool:
        """Whether the last step of a cell computes activations twice to keep fewer."""
        return self.recipe(cell).last.of.trains and self.configuration.training.gradient_checkpointing

    # Quantization

    def cell_arguments(self, cell: Cell) -> dict[str, str]:
        """What `python -m methods` is told about a cell, as JSON."""
        return {
            "cell": json.dumps(asdict(cell)),
            "scheme": json.dumps(self.configuration.schemes[cell.scheme].spec),
            "options": json.dumps(self.recipe(cell).last.options),
        }

    def format_files(self, scheme: str) -> list[str]:
        """Code of the number formats that a scheme names. No import statement names them, so the rules do."""
        return format_files(self.configuration.schemes[scheme].scheme.formats)

    def allocation(self, model: str, scheme: str) -> str | None:
        """Path of the bits of each layer, for a scheme that does not give all layers the same."""
        return f"{self.results}/{model}/{scheme}/allocation.json" if scheme in self.mixed else None

    def sensitivity(self, scheme: str) -> str:
        """Name of the sensitivities of a model's layers by all that they depend on except the model, so that schemes which
        differ in their average only share them."""
        config = self.configuration
        weights = config.schemes[scheme].scheme.weights
        groups = [weights.group_size or "channel", weights.other_group_size]
        grid = f"w{'.'.join(map(str, weights.widths))}-g{'.'.join(str(size) for size in groups if size)}"
        grid += f"-{weights.scale_dtype}"
        if weights.format != "integer":
            grid = f"{weights.format}-{grid}"
        text = f"{config.calibration.dataset}-{config.allocation.samples}x{config.allocation.sequence_length}"
        return f"{weights.sensitivity}-{grid}-{text}"

    # Evaluations

    @cached_property
    def references(self) -> dict[str, str]:
        """For each evaluation that compares with the full-precision model: the name of the file of what that model predicts,
        which says on what text and with which options."""
        names = {}
        for entry in self.configuration.evaluations.values():
            if entry.given == "reference":
                options = "-".join(f"{key}{value}" for key, value in entry.options.items())
                names[entry.name] = f"{entry.dataset}-{options}"
        return names

    def evaluation_data(self, name: str, model: str) -> str | list[str] | None:
        """Path or paths of what an evaluation of a model's checkpoints is given."""
        entry = self.configuration.evaluations[name]
        if entry.given == "tasks":
            return [f"resources/tasks/{entry.source}/{task}" for task in entry.tasks]
        if entry.given == "reference":
            return f"resources/reference/{model}/{self.references[name]}.safetensors"
        return self.token_file(model, entry.dataset) if entry.given == "tokens" else None

    def evaluation_arguments(self, model: str) -> str:
        """What `python -m evals` is told to do with a model's checkpoints, as JSON."""
        entries: dict[str, dict[str, Any]] = {}
        for name, entry in self.configuration.evaluations.items():
            entries[name] = {"options": entry.options}
            if data := self.evaluation_data(name, model):
                entries[name]["data"] = data
        return json.dumps(entries)

    # The report

    def to_json(self) -> dict[str, Any]:
        """What the report needs to know: the cells that there should be, and the configuration they come from."""
        evaluations = {name: entry.options for name, entry in self.configuration.evaluations.items()}
        cells = [self._cell_record(cell) for cell in self.cells]
        return {"name": self.name, "cells": cells, "evaluations": evaluations, "config": self.configuration.raw}

    def _cell_record(self, cell: Cell) -> dict[str, Any]:
        recipe = self.recipe(cell)
        steps = [self._step_record(*pair) for pair in zip(self.chain(cell), recipe.steps, strict=True)]
        facts = {"path": cell.path, "kind": recipe.kind, "as_in_paper": recipe.as_in_paper, "steps": steps}
        return asdict(cell) | facts

    def _step_record(self, cell: Cell, step: Step) -> dict[str, Any]:
        """What is told of one step of a recipe. cell: that of the steps up to this one."""
        tokens = {"dataset": self._dataset(step.reads)} | self.amount(cell) if step.reads != "none" else None
        return {
            "method": cell.method,
            "path": cell.path,
            "module": step.module,
            "options": step.options,
            "tokens": tokens,
        }


def load(config: dict[str, Any]) -> Matrix:
    """Parse a configuration, multiply its matrix and check it. ConfigError for the first mistake."""
    configuration = parse(config)
    cells = [
        Cell(model, scheme, method, seed, budget if configuration.methods[method].trains else None)
        for block in configuration.matrix
        for model, scheme, method, seed, budget in itertools.product(
            block.models, block.schemes, block.methods, block.seeds, block.budgets or (configuration.training.tokens,)
        )
    ]
    matrix = Matrix(configuration, tuple(dict.fromkeys(cells)))
    checks.check(matrix)
    return matrix


def one_of(names: Iterable[str]) -> str:
    """A regular expression that matches just these names, or nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"
