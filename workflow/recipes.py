"""Recipes: the lists of steps that the entries under methods: stand for (README.md of this folder).

What parses may still be wrong, such as steps that do not fit each other: workflow/checks.py finds that. Neither torch nor
transformers is imported, since Snakemake parses the configuration every time it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from methods.core import recipe
from methods.core.job import registry
from methods.core.job.options import build_config, choose
from workflow.errors import ConfigError, place

STEP_KEYS = ("use", "options", "data")  # of a step that is written out


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
    def trains(self) -> bool:
        return any(step.of.trains for step in self.steps)

    @property
    def needs_scheme(self) -> bool:
        """Whether what it leaves depends on the scheme."""
        return any(step.of.needs_scheme for step in self.steps)

    @property
    def kind(self) -> str:
        """What the whole chain is; one of recipe.CHAIN_KINDS."""
        return recipe.chain_kind([(step.of.kind, step.of.trains) for step in self.steps])

    @property
    def as_in_paper(self) -> bool | None:
        """Whether it has its paper's data, start and options. None if the module of its last step does not say them."""
        step = self.last
        if step.of.paper is None:
            return None
        same = all(step.options[name] == value for name, value in step.of.paper.items())
        return same and self.start is None and step.reads == step.of.reads


class Library:
    """The recipes of a configuration's entries and, where a module has no entry, of the module alone.

    first: names whose mistakes are reported before those of others. ConfigError for an entry that is not a list of steps.
    """

    def __init__(self, entries: Mapping[str, Any], first: Iterable[str] = ()):
        self.entries = entries
        self.names = {*registry.names("methods"), *entries}
        order = dict.fromkeys([*(name for name in first if name in entries), *entries])
        steps = {name: self._steps(name) for name in order}
        # The name of a prefix must not depend on the matrix, so the entries keep their order here.
        self.steps = {name: steps[name] for name in entries}

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
        own = {key: entry[key] for key in STEP_KEYS if key in entry}
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
