"""Folders as registries: each public module of methods/, evals/ or methods/core/formats/ is one thing, found by its file.

A module says what it is in one object, `METHOD = Method(...)` or `EVALUATION = Evaluation(...)`, and what its options are
in a frozen dataclass `Config`. Both are read here without importing torch: checking a configuration must not cost the seconds
that torch takes to import.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from methods.core.job.files import ROOT
from methods.core.job.options import choose

# What a declaration may import, beside the standard library: modules that do not import torch themselves.
IMPORTABLE = ("methods.core.job.options", "methods.core.job.registry")
DECLARED = ("Config", "METHOD", "EVALUATION", "check", "held")  # what is read of a module

QUANTIZING = ("ptq", "qat")  # kinds of methods that leave codes
KINDS = ("reference", "transform", "ptq", "qat", "control")
READS = ("none", "calibration", "training", "generated")
TRAINING = ("training", "generated")  # two sources of the same thing; a configuration may exchange them
WEIGHTS, CODES = "weights", "codes"  # the states of a model's layers: ordinary, or quantized
GIVEN = ("none", "tokens", "reference", "tasks")
TEXTS = ("tokens", "reference")  # of GIVEN, those of a text
LABEL = re.compile("[a-z0-9][a-z0-9_-]*")  # no dot, which parts the name of a result's file


@dataclass(frozen=True)
class Method:
    """What a step does to a model.

    kind: reference (nothing), transform (other weights of the same function), ptq or qat (quantizes, without or with
    training), control (trains in full precision). reads: the tokens that it is given. takes: the states in which it
    accepts what the step before left; every step accepts ordinary weights. paper: the paper's values of options whose
    defaults here may be others; learning rates, which belong to a training budget, are not among them. distills: `apply`
    takes `teacher`, a function that loads the full-precision model, and is given it where the model that it starts from
    is quantized. differentiates: needs gradients although it does not train on text. for_scheme: of a transform that
    depends on what its weights will be rounded to; schemes do not share its checkpoint. divides: what it takes of the tokens
    are sums, so several processes may share them (ranks.py).
    """

    kind: str
    reads: str = "none"
    takes: tuple[str, ...] = (WEIGHTS,)
    paper: Mapping[str, Any] | None = None
    distills: bool = False
    for_scheme: bool = False
    differentiates: bool = False
    divides: bool = False

    def __post_init__(self):
        for value, choices, what in ((self.kind, KINDS, "kind"), (self.reads, READS, "reads")):
            if value not in choices:
                raise ValueError(f"{what} {value!r} is none of {', '.join(choices)}")
        if self.trains != (self.kind in ("qat", "control")) and self.kind != "transform":
            raise ValueError(
                f"kind {self.kind} {'does not train' if self.trains else 'trains'}, but it reads {self.reads}"
            )
        if not set(self.takes) <= {WEIGHTS, CODES}:
            raise ValueError(f"takes {self.takes!r} has other states than {WEIGHTS!r} and {CODES!r}")

    @property
    def quantizes(self) -> bool:
        return self.kind in QUANTIZING

    @property
    def needs_scheme(self) -> bool:
        return self.quantizes or self.for_scheme

    @property
    def leaves(self) -> str:
        """The state in which it leaves the layers."""
        return CODES if self.quantizes else WEIGHTS

    @property
    def trains(self) -> bool:
        return self.reads in TRAINING


@dataclass(frozen=True)
class Held:
    """What a step keeps in memory, for the prediction of workflow/needs.py.

    frozen: bytes for each weight of the linear layers that stay as they are; None for those of the dtype it computes in.
    trained: values that are trained, in fp32 with Adam's two moments, for each weight. rank: of low-rank terms, trained too.
    teacher: whether the full-precision model is there as well. blockwise: whether one block is worked on at a time, and the
    others are as they were loaded, or in files (methods/core/model/resume.py). rounds: forward and backward passes of each
    token. streams: of hidden states, where the step goes through the blocks: two if it also follows the model as it was.
    """

    frozen: float | None = None
    trained: float = 0.0
    rank: int = 0
    teacher: bool = False
    blockwise: bool = False
    rounds: float = 1.0
    streams: int = 1


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation is given besides the checkpoint, and whether its numbers are of the machine: those are measured
    again on another processor or with other threads. packages: that it uses where they are installed; measured again with
    another version of one."""

    given: str = "none"
    machine_dependent: bool = False
    packages: tuple[str, ...] = ()

    def __post_init__(self):
        if self.given not in GIVEN:
            raise ValueError(f"given {self.given!r} is none of {', '.join(GIVEN)}")


@dataclass(frozen=True)
class Declaration:
    """The declared part of a module: its options and what it is. Where it has them, its own check of a combination, and what
    it holds in memory, a function of its options and of the number of sequences that it reads."""

    Config: type
    of: Method | Evaluation
    check: Callable[[Any, Any], None] | None
    held: Callable[[Any, int], Held] | None


def names(package: str) -> list[str]:
    """Names of the public modules of a package, such as "methods" or "methods.core.formats"."""
    folder = ROOT.joinpath(*package.split("."))
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))


def declared_evaluation(name: str) -> tuple[str, Declaration]:
    """The module of an evaluation's entry, and what it declares. `perplexity-c4` is `perplexity`, on a text that it calls c4.

    ValueError if there is no such module, or if it is called something and reads no text.
    """
    module, dash, label = name.partition("-")
    choose(module if module in names("evals") else name, names("evals"), "evaluation")
    declared = declaration("evals", module)
    if dash and (not LABEL.fullmatch(label) or declared.of.given not in TEXTS):
        reads_text = [each for each in names("evals") if declaration("evals", each).of.given in TEXTS]
        raise ValueError(
            f"{name!r}: NAME-LABEL is an evaluation on one more text, NAME is {' or '.join(reads_text)}, and LABEL is of "
            "small letters, digits, - and _"
        )
    return module, declared


def load(package: str, name: str) -> ModuleType:
    """A module of a package, imported."""
    return importlib.import_module(f"{package}.{name}")


def declaration(package: str, name: str) -> Declaration:
    """What a module declares, read from its file. ValueError if the file does not declare it as the protocol says."""
    return read_declaration(ROOT.joinpath(*package.split("."), f"{name}.py"))


@cache
def read_declaration(path: Path) -> Declaration:
    """`declaration` of a file anywhere.

    Executed are its imports from the standard library and from IMPORTABLE, its literal constants, `Config`, `check`, `held`,
    and the object that says what it is.
    """
    module = ModuleType(f"{path.stem}_declaration")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body if _declares(node)]
    try:
        exec(compile(ast.Module(nodes, []), str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(
            f"{path}: Config, check, held, METHOD and EVALUATION may use the standard library, {', '.join(IMPORTABLE)} and "
            f"literal constants only: {error}"
        ) from None
    what = getattr(module, "METHOD", None) or getattr(module, "EVALUATION", None)
    if what is None or not hasattr(module, "Config"):
        raise ValueError(f"{path} must have a Config and a METHOD or EVALUATION; see {path.parent / '__init__.py'}")
    return Declaration(module.Config, what, getattr(module, "check", None), getattr(module, "held", None))


@cache
def constants(package: str, name: str) -> dict[str, Any]:
    """The literal constants of a module, by name, read from its file."""
    nodes = ast.parse(ROOT.joinpath(*package.split("."), f"{name}.py").read_text(encoding="utf-8")).body
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and _is_literal(node.value)]
    return {t.id: ast.literal_eval(n.value) for n in assigned for t in n.targets if isinstance(t, ast.Name)}


def _declares(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] in sys.stdlib_module_names or node.module in IMPORTABLE
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        named = any(isinstance(t, ast.Name) and t.id in DECLARED for t in targets)
        return named or _is_literal(node.value)
    return getattr(node, "name", None) in DECLARED


def _is_literal(value: ast.expr | None) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError):
        return False
    return True
