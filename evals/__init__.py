"""Evaluations of a checkpoint. One public module in this folder is one evaluation; the folder is the registry.

An evaluation's module has, as a method's has (methods/__init__.py reads both):

    Config    frozen dataclass: its options and their defaults; one with a field `dtype` says in which it must be computed,
              "float32" or "compute", what the machine computes the model in and the others are computed in
    DATA      what it is given: "tokens", the file of a tokenized text; "reference", the file of what the full-precision
              model predicts on a text; "tasks", folders of benchmark items; "none"
    evaluate(model, config, data, log) -> Result

and, for one whose numbers are of the machine, so that with other threads or another processor it is measured again,

    OF_THE_MACHINE = True

`data` is a path, a list of paths for "tasks", or None. An evaluation never knows which method made the checkpoint.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from methods import available as _available

FOLDER = Path(__file__).parent
DATA = ("none", "tokens", "reference", "tasks")


@dataclass
class Result:
    """What an evaluation returns; the fields of a result file that only it can fill."""

    protocol: str  # two results may share a column only if their protocols are equal
    metrics: dict[str, dict[str, Any]]  # name -> value, stderr, higher_is_better, unit
    n: int  # items scored
    partial: bool  # True if a limit left items out
    data: dict[str, Any]  # which data it was: names and hashes
    items: dict[str, list] = field(default_factory=dict)  # column -> per-item values, for paired statistics


def metric(
    value: float, stderr: float | None = None, *, higher_is_better: bool, unit: str, over: list[str] | None = None
) -> dict[str, Any]:
    """One entry of `Result.metrics`; no standard error for what is counted, not sampled.

    over: the groups of the per-item table whose shares of right answers it is the mean of, so that two checkpoints' values
    can be compared item by item.
    """
    found = {"value": float(value), "stderr": None if stderr is None else float(stderr)}
    return found | {"higher_is_better": higher_is_better, "unit": unit} | ({"over": over} if over else {})


def available(folder: Path = FOLDER) -> list[str]:
    """Names of the evaluations."""
    return _available(folder)


def load(name: str) -> ModuleType:
    """The module of an evaluation."""
    return importlib.import_module(f"evals.{name}")
