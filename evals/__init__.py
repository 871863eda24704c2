"""Evaluations of a checkpoint. One public module in this folder is one evaluation; the folder is the registry.

An evaluation's module has three names:

    Config       frozen dataclass: its options and their defaults. A field `dtype` says in which dtype the evaluation must be
                 computed: "float32", or "compute", the one in which the machine computes the model. Without the field it is
                 "compute".
    EVALUATION   methods.core.job.registry.Evaluation(given, machine_dependent). `given` names its data: "tokens", the file of
                 a tokenized text; "reference", the file of the full-precision model's predictions on a text; "tasks",
                 folders of benchmark items; or "none"
    evaluate(model, checkpoint, config, data, log) -> Result

`checkpoint` is the folder that `model` was loaded from. `data` is a path, a list of paths for "tasks", or None. An evaluation
never knows which method made the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from methods.core.job.options import choose

CHANGES = ("difference", "relative")


@dataclass
class Result:
    """What an evaluation returns; the fields of a result file that only it can fill."""

    protocol: str  # two results may share a column only if their protocols are equal
    metrics: dict[str, dict[str, Any]]  # name -> what `metric` returns
    n: int  # items scored
    partial: bool  # True if a limit left items out
    data: dict[str, Any]  # which data it was: names and hashes
    items: dict[str, list] = field(default_factory=dict)  # column -> per-item values, for paired statistics


def metric(
    value: float,
    stderr: float | None = None,
    *,
    higher_is_better: bool,
    unit: str,
    over: list[str] | None = None,
    items: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One entry of `Result.metrics`; no standard error for what is counted, not sampled.

    These say how the metric follows from `Result.items`, by which two checkpoints are compared item by item:

    over: for a metric of questions. It is the mean, over these groups, of a group's mean: of right answers, without `items`.
    items: {"column": ..., "change": ...}. With change "difference" the metric is the column's mean, and two checkpoints
        differ by the difference of their means. With "relative" it is the exponential of the column's mean, and they
        differ by the ratio of the metric minus one, which is expm1 of the difference of the means.
    """
    if items:
        if set(items) != {"column", "change"}:
            raise ValueError(f"items is {items}; it has the keys column and change")
        choose(items["change"], CHANGES, "change of a metric")
    entry = {"value": float(value), "stderr": None if stderr is None else float(stderr)}
    entry |= {"higher_is_better": higher_is_better, "unit": unit}
    return entry | ({"over": over} if over else {}) | ({"items": items} if items else {})


def mean_and_stderr(values: np.ndarray) -> tuple[float, float | None]:
    """Mean of independent items and its standard error; None for the error of a single one."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
