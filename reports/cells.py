"""From the files of a result tree to one Cell for each cell of the matrix: its state and, if it ran, its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from methods.core.job.files import read_json, sha256_file
from methods.core.recipe import CHAIN_KINDS
from reports.items import UNREADABLE, Stratum, read_samples, read_timings
from reports.metrics import REGISTER, find
from reports.run import NAN, Run, mismatch, read_run

NOT_RUN = "has no result: it has not run, or it was killed"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # as in workflow/schemas
TEXT = re.compile(r"/([^/@]+)@")  # in the protocol of an evaluation that reads one
# Kinds of quantized cells: nothing was trained; the model was, in full precision only; a step that quantizes trained.
PTQ, CONTROL_PTQ, QAT = CHAIN_KINDS[-3:]
QUANTIZED = {PTQ: "PTQ", CONTROL_PTQ: "fine-tune, then PTQ", QAT: "QAT"}


@dataclass(frozen=True)
class Measurement:
    """A metric's entry of a result file.

    over: the groups of questions that it is the mean of; empty for a metric of windows. change: what the difference of the
    means is: "relative", of the logarithms, or "difference"; empty for a share of right answers.
    """

    value: float
    stderr: float | None = None
    unit: str = ""
    higher_is_better: bool = False
    over: tuple[str, ...] = ()
    change: str = ""
    evaluation: str = ""
    protocol: str = ""
    partial: bool = False
    seconds: float = NAN  # that the evaluation took

    @property
    def text(self) -> str:
        """The dataset that it is of, by its protocol; empty for a metric of questions."""
        return found[1] if (found := TEXT.search(self.protocol)) else ""

    @property
    def items(self) -> str:
        """The items that it is a mean over, in a word."""
        return "questions" if self.over else "windows"


@dataclass(frozen=True)
class Speed:
    """What was timed: a record for each phase, batch size, repeat and kind of weights. The kernel, bytes read per second, and
    what types of weights llama.cpp had; kernel and types are empty where there is none."""

    timings: tuple[dict[str, Any], ...]
    kernel: str
    bandwidth: float
    llama_cpp: str


@dataclass(frozen=True)
class Missing:
    """Why a cell has not all of its results: one of them has not been made, or was made otherwise, or failed."""

    reason: str
    failed: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell of the matrix. Two cells are never equal, so that a cell is the key of what is known about it elsewhere.

    budget: tokens of each of its trainings; None if no step trains. kind: of methods.core.recipe.CHAIN_KINDS, empty in a
    matrix of an older version. module, options: of the last step.
    missing: what there is not; empty if all is done. departures, provenance: of the run and of its evaluations. samples: the
    items of each metric that has some. known: the metrics that some cell of the matrix has; None while results are missing.
    """

    model: str
    scheme: str
    method: str
    seed: int
    kind: str
    budget: int | None = None
    path: str = ""
    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    as_in_paper: bool | None = None
    missing: tuple[Missing, ...] = ()
    run: Run = field(default_factory=Run)
    metrics: Mapping[str, Measurement] = field(default_factory=dict)
    samples: Mapping[str, tuple[Stratum, ...]] = field(default_factory=dict)
    speed: Speed | None = None
    departures: tuple[str, ...] = ()
    provenance: tuple[dict[str, Any], ...] = ()
    known: frozenset[str] | None = None

    @property
    def state(self) -> str:
        """ "done", "failed" or "missing"."""
        if any(m.failed for m in self.missing):
            return "failed"
        return "missing" if self.missing else "done"

    @property
    def reason(self) -> str:
        """Why its state is not "done". A failure says more than a result that is not there."""
        reasons = [m.reason for m in self.missing if m.failed == (self.state == "failed")]
        return "; ".join(dict.fromkeys(reasons))

    @property
    def quantized(self) -> bool:
        return self.kind in QUANTIZED

    @property
    def is_reference(self) -> bool:
        """Whether it is the full-precision model itself, which all others of the model are compared with."""
        return self.kind == "reference"

    @property
    def bits(self) -> dict[str, int]:
        """Bits of each quantized layer."""
        return {layer.name: layer.bits for layer in self.run.layers}

    @property
    def mixed(self) -> bool:
        """Whether its layers differ in their bits."""
        return len(set(self.bits.values())) > 1

    @property
    def scores(self) -> dict[str, str]:
        """The metric that each task is judged by."""
        return {
            entry.over[0]: name for name, entry in self.metrics.items() if len(entry.over) == 1 and not entry.change
        }

    def value(self, name: str) -> float:
        """A metric's value, or a fact of the run, by its name; NaN if it was not measured. KeyError for a misspelled name."""
        if name in self.metrics:
            return self.metrics[name].value
        if name in REGISTER:
            return getattr(self.run, name, NAN)
        if self.known is not None and name not in self.known and find(name).name not in REGISTER:
            raise KeyError(f"{name!r} is no metric of any cell, and reports/metrics.py has none of this name")
        return NAN


def several_budgets(cells: Iterable[Cell]) -> bool:
    """Whether cells were trained on different numbers of tokens, so that a name alone may be that of several."""
    return len({cell.budget for cell in cells if cell.budget}) > 1


def read_matrix(path: Path) -> dict[str, Any]:
    """`matrix.json` as the workflow writes it. ValueError if it is something else.

    In a file of an older version the cells have no kind, no budget and no steps; here these are empty.
    """
    matrix = read_json(path)
    if not isinstance(matrix, dict) or not {"name", "cells", "evaluations", "config"} <= matrix.keys():
        raise ValueError(
            f"{path} is not a matrix.json: it has {', '.join(matrix) if isinstance(matrix, dict) else matrix}"
        )
    try:
        cells = [{"kind": "", "steps": [], "budget": None} | cell for cell in matrix["cells"]]
        names = [matrix["name"], *matrix["evaluations"], *(name for cell in cells for name in _names(cell))]
        wrong = [name for name in names if not NAME.fullmatch(name)]  # they become names of files here
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a matrix.json: {type(error).__name__}: {error}") from None
    if wrong:
        raise ValueError(f"{path} is not a matrix.json: {wrong[0]!r} is not a name")
    return matrix | {"cells": cells}


def _names(cell: dict[str, Any]) -> list[str]:
    """The names in a cell of matrix.json. Raises what reading it does if it lacks what all cells have."""
    steps = [(step["module"], step["options"].keys(), step.get("path", cell["path"])) for step in cell["steps"]]
    if not isinstance(cell["seed"], int) or not isinstance(cell["budget"], int | None):
        raise TypeError(f"{cell['path']} has a seed or a budget that is no number")
    parts = [part for path in (cell["path"], *(path for *_, path in steps)) for part in path.split("/")]
    return [cell["model"], cell["scheme"], cell["method"], *parts, *(module for module, *_ in steps)]


def read_cells(matrix: dict[str, Any], folder: Path) -> list[Cell]:
    """The cells in the matrix's order. What was scored by another protocol than the rest is left out."""
    cells = _of_one_protocol([_read_cell(entry, folder, matrix) for entry in matrix["cells"]])
    if any(cell.missing for cell in cells):
        return cells
    known = frozenset(metric for cell in cells for metric in cell.metrics)
    return [replace(cell, known=known) for cell in cells]


def _read_cell(entry: dict[str, Any], tree: Path, matrix: dict[str, Any]) -> Cell:
    about = {key: entry[key] for key in ("model", "scheme", "method", "seed", "budget", "path", "kind")}
    about["as_in_paper"] = entry.get("as_in_paper")
    if entry["steps"]:
        about |= {key: entry["steps"][-1][key] for key in ("module", "options")}
    try:
        return _read_run(about, entry, tree, matrix)
    except UNREADABLE as error:
        return Cell(**about, missing=(_unreadable(tree / entry["path"], error),))


def _unreadable(path: Path, error: Exception) -> Missing:
    return Missing(f"{path} cannot be read: {type(error).__name__}: {error}")


def _read_run(about: dict[str, Any], entry: dict[str, Any], tree: Path, matrix: dict[str, Any]) -> Cell:
    folder = tree / entry["path"]
    record = _read(folder / "run.json")
    if record is None:
        return Cell(**about, missing=(_not_run(entry, tree, matrix["config"]),))
    if reason := mismatch(record, entry, matrix["config"]):
        return Cell(**about, missing=(Missing(reason),))
    results = [
        _read_result(evaluation, options, folder / "evals", record["checkpoint_sha256"])
        for evaluation, options in matrix["evaluations"].items()
    ]
    read = [result for result in results if isinstance(result, _Result)]
    departures = [*(record["allocation"] or {"departures": []})["departures"], *record["departures"]]
    return Cell(
        **about,
        missing=tuple(result for result in results if isinstance(result, Missing)),
        run=read_run(record, folder),
        metrics={name: entry for result in read for name, entry in result.metrics.items()},
        samples={name: strata for result in read for name, strata in result.samples.items()},
        speed=next((result.speed for result in read if result.speed), None),
        departures=(*departures, *(departure for result in read for departure in result.departures)),
        provenance=(record["provenance"], *(result.provenance for result in read if result.provenance)),
    )


def _not_run(entry: dict[str, Any], tree: Path, config: dict[str, Any]) -> Missing:
    """Why a cell has no run: the first failure among its steps, or what it waits for.

    A step before the last one has the folder of the shorter recipe that ends with it. An older matrix.json does not name it.
    """
    own = tree / entry["path"]
    for number, step in enumerate(entry["steps"], 1):
        folder = tree / step.get("path", entry["path"])
        failed = None if (folder / "run.json").is_file() else _read(folder / "failed.json")
        if failed and folder != own:
            reason = f"step {number} of {len(entry['steps'])}, {step['method']}, failed: {_error(failed)}"
            return Missing(reason, failed=True)
    if failed := _read(own / "failed.json"):
        return Missing(_error(failed), failed=True)
    mixed = "average_bits" in config["schemes"][entry["scheme"]].get("weights", {})
    if mixed and not (own.parents[1] / "allocation.json").is_file():
        return Missing("it waits for the bits of its layers: there is no allocation.json")
    return Missing(f"the cell {NOT_RUN}")


@dataclass(frozen=True)
class _Result:
    """What an evaluation adds to its cell."""

    metrics: dict[str, Measurement]
    samples: dict[str, tuple[Stratum, ...]]
    speed: Speed | None
    departures: list[str]
    provenance: dict[str, Any] | None


def _read_result(evaluation: str, options: dict[str, Any], folder: Path, checkpoint_sha256: str) -> _Result | Missing:
    """An evaluation's result, or why it is missing."""
    try:
        return _readable_result(evaluation, options, folder, checkpoint_sha256)
    except UNREADABLE as error:
        return _unreadable(folder / f"{evaluation}.json", error)


def _readable_result(
    evaluation: str, options: dict[str, Any], folder: Path, checkpoint_sha256: str
) -> _Result | Missing:
    items = folder / f"{evaluation}.parquet"
    if failed := _read(folder / f"{evaluation}.failed.json"):
        return Missing(f"{evaluation}: {_error(failed)}", failed=True)
    result = _read(folder / f"{evaluation}.json")
    if result is None:
        return Missing(f"{evaluation} {NOT_RUN}")
    if result["checkpoint_sha256"] != checkpoint_sha256:
        return Missing(f"{evaluation} is of an older checkpoint")
    if result["options"] != options:
        return Missing(f"{evaluation} was made with another configuration")
    if not items.is_file() and any(map(_has_items, result["metrics"].items())):
        return Missing(f"{items.name}, the values of {evaluation} item by item, is not there")
    if items.is_file() and result.get("items_sha256") not in (None, sha256_file(items)):  # None in an older version
        return Missing(f"{items} has been changed or damaged: its hash is not that in {evaluation}.json")
    samples = read_samples(items, result["metrics"]) if items.is_file() else {}
    timings = read_timings(items) if items.is_file() and not samples else ()
    speed = _speed(timings, result["data"]) if timings else None
    metrics = {name: _measurement(evaluation, result, metric) for name, metric in result["metrics"].items()}
    return _Result(metrics, samples, speed, result["departures"], result.get("provenance"))


def _speed(timings: tuple[dict[str, Any], ...], data: dict[str, Any]) -> Speed:
    llama_cpp = data.get("llama_cpp") or {"types": ""}  # older results have not heard of it
    return Speed(timings, data["kernel"] or "", data["bandwidth"], llama_cpp["types"])


def _has_items(metric: tuple[str, dict[str, Any]]) -> bool:
    """Whether a metric of a result file is made of what its per-item file has."""
    name, entry = metric
    return "over" in entry or "items" in entry or find(name).machine_dependent


def _measurement(evaluation: str, result: dict[str, Any], metric: dict[str, Any]) -> Measurement:
    return Measurement(
        value=float(metric["value"]),
        stderr=None if metric["stderr"] is None else float(metric["stderr"]),
        **{key: metric[key] for key in ("unit", "higher_is_better")},
        over=tuple(metric.get("over", ())),
        change=metric.get("items", {}).get("change", ""),
        evaluation=evaluation,
        **{key: result[key] for key in ("protocol", "partial", "seconds")},
    )


def _of_one_protocol(cells: Sequence[Cell]) -> list[Cell]:
    """The cells less what was scored otherwise than full precision, or without it than the model's first cell that has it."""
    expected: dict[tuple[str, str], tuple[str, str]] = {}
    for cell in sorted(cells, key=lambda cell: not cell.is_reference):
        whose = "full precision" if cell.is_reference else f"{cell.scheme} {cell.method}"
        for name, entry in cell.metrics.items():
            expected.setdefault((cell.model, name), (entry.protocol, whose))
    kept = []
    for cell in cells:
        others = {n: entry for n, entry in cell.metrics.items() if entry.protocol != expected[cell.model, n][0]}
        missing = []
        for name, entry in others.items():
            protocol, whose = expected[cell.model, name]
            missing.append(Missing(f"{entry.evaluation} was scored as {entry.protocol}, {whose} as {protocol}"))
        metrics = {name: entry for name, entry in cell.metrics.items() if name not in others}
        samples = {name: strata for name, strata in cell.samples.items() if name not in others}
        kept.append(replace(cell, metrics=metrics, samples=samples, missing=(*cell.missing, *missing)))
    return kept


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _error(failed: dict[str, Any]) -> str:
    """What a failed.json says."""
    return failed["error"] + (f" (log: {failed['log']})" if failed.get("log") else "")
