"""Per-item files of evaluations, read as the metrics of the result declare: values of windows, or right answers by group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# What a file that is not as it was written makes of reading it.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pa.ArrowException,
)
ANSWERS = ("group", "task", "item")
RIGHT = "right"  # what a question is judged by, unless a metric names another column
TIMINGS = {"weights", "batch", "repeat", "phase", "seconds", "tokens"}


@dataclass(frozen=True, eq=False)
class Stratum:
    """Values of items that are averaged with equal weight, and a digest of which items these are."""

    values: np.ndarray
    digest: str


def read_samples(path: Path, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Stratum, ...]]:
    """The items of each metric of a result that declares them, see `evals.metric`. ValueError if a column is missing."""
    columns = {name: metric.get("items", {"column": RIGHT})["column"] for name, metric in metrics.items()}
    groups = {name: metric["over"] for name, metric in metrics.items() if "over" in metric}
    windows = {name: columns[name] for name, metric in metrics.items() if "items" in metric and name not in groups}
    samples: dict[str, tuple[Stratum, ...]] = {}
    if windows:
        table = _read(path, "window", *windows.values())
        digest = hashlib.sha256(table["window"].tobytes()).hexdigest()
        samples |= {name: (Stratum(table[column].astype(float), digest),) for name, column in windows.items()}
    if groups:
        table = _read(path, *ANSWERS, *(columns[name] for name in groups))
        strata = {column: _answers(table, column) for column in {columns[name] for name in groups}}
        if unknown := {group for over in groups.values() for group in over} - {*table["group"]}:
            raise ValueError(f"{path.name} has no answers of {', '.join(sorted(unknown))}")
        samples |= {name: tuple(strata[columns[name]][group] for group in over) for name, over in groups.items()}
    return samples


def read_timings(path: Path) -> tuple[dict[str, Any], ...]:
    """A record for each phase, batch size, repeat and kind of weights; empty if the file has something else."""
    with pq.ParquetFile(path) as file:
        return tuple(file.read().to_pylist()) if set(file.schema_arrow.names) >= TIMINGS else ()


def _read(path: Path, *columns: str) -> dict[str, np.ndarray]:
    # By pyarrow, since pandas takes four times as long for tables so small.
    with pq.ParquetFile(path) as file:
        if missing := set(columns) - set(file.schema_arrow.names):
            raise ValueError(
                f"{path.name} lacks the columns {', '.join(sorted(missing))}, which its metrics are made of"
            )
        read = file.read(columns=list(dict.fromkeys(columns)), use_threads=False)
    return {name: column.to_numpy() for name, column in zip(read.column_names, read.columns, strict=True)}


def _answers(table: dict[str, np.ndarray], column: str) -> dict[str, Stratum]:
    """A column's values by group."""
    strata = {}
    for group in dict.fromkeys(table["group"]):
        at = table["group"] == group
        items = "\n".join(table["task"][at]).encode() + table["item"][at].tobytes()
        strata[group] = Stratum(table[column][at].astype(float), hashlib.sha256(items).hexdigest())
    return strata
