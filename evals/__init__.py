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
    value: float, stderr: float | None = None, *, higher_is_better: bool, unit: str, over: list[str] | None = None
) -> dict[str, Any]:
    """One entry of `Result.metrics`; no standard error for what is counted, not sampled.

    over: the groups of the per-item table whose shares of right answers it is the mean of, so that two checkpoints' values
    can be compared item by item.
    """
    found = {"value": float(value), "stderr": None if stderr is None else float(stderr)}
    return found | {"higher_is_better": higher_is_better, "unit": unit} | ({"over": over} if over else {})
