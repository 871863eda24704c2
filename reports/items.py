"""Per-item files of evaluations: values of windows, right answers of questions, or timings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from reports.metrics import COLUMNS, REGISTER

ANSWERS = ("group", "task", "item", "right")


@dataclass(frozen=True, eq=False)
class Stratum:
    """Values of items that are averaged with equal weight, and a digest of which items these are."""

    values: np.ndarray
    digest: str


@dataclass(frozen=True)
class Items:
    """What a per-item file holds: strata by metric if its items are windows, by group if they are questions; or timings."""

    windows: dict[str, Stratum] = field(default_factory=dict)
    answers: dict[str, Stratum] = field(default_factory=dict)
    timings: tuple[dict[str, Any], ...] = ()

    def strata(self, metric: str, over: tuple[str, ...]) -> list[Stratum]:
        """Those of a metric, which for questions is a mean over groups; none for a metric that is not of items."""
        if metric in self.windows:
            return [self.windows[metric]]
        return [self.answers[group] for group in over]


def read_items(path: Path) -> Items:
    """The per-item file of one result."""
    # By pyarrow, since pandas takes four times as long for tables so small.
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if "phase" in names:
            return Items(timings=tuple(file.read().to_pylist()))
        used = [name for name in names if name == "window" or name in (*COLUMNS, *ANSWERS)]
        read = file.read(columns=used)
        table = {name: column.to_numpy() for name, column in zip(read.column_names, read.columns, strict=True)}
    return Items(windows=_windows(table)) if "window" in table else Items(answers=_answers(table))


def _windows(table: dict[str, np.ndarray]) -> dict[str, Stratum]:
    digest = hashlib.sha256(table["window"].tobytes()).hexdigest()
    return {
        metric.name: Stratum(table[metric.column].astype(float), digest)
        for metric in REGISTER.values()
        if metric.column in table
    }


def _answers(table: dict[str, np.ndarray]) -> dict[str, Stratum]:
    strata = {}
    for group in dict.fromkeys(table["group"]):
        at = table["group"] == group
        items = "\n".join(table["task"][at]).encode() + table["item"][at].tobytes()
        strata[group] = Stratum(table["right"][at].astype(float), hashlib.sha256(items).hexdigest())
    return strata
