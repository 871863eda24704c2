"""From the files of a result tree to one Cell for each cell of the matrix: its state and, if it ran, its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods.core.job.files import read_json
from methods.core.statistics import Flips, Interval
from reports.items import Stratum, read_samples, read_timings
from reports.metrics import REGISTER, find, is_part
from reports.plan import mismatch
from reports.run import Run, read_run

NAN = math.nan
NOT_RUN = "has no result: it has not run, or it was killed"
# Kinds of quantized cells: nothing was trained; the model was, in full precision only; a step that quantizes trained.
QUANTIZED = {"ptq": "PTQ", "control_ptq": "fine-tune, then PTQ", "qat": "QAT"}


@dataclass(frozen=True)
class Measurement:
    """A metric's entry of a result file.

    over: the groups of questions that it is the mean of. change: for a metric of windows, what the difference of the means
    over windows is: "relative", of the logarithms, or "difference". At most one of these is there.
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
    def items(self) -> str:
        """The items that it is a mean over, in a word."""
        return "windows" if self.change else "questions"


@dataclass(frozen=True)
class Speed:
    """What was timed: a record for each phase, batch size, repeat and kind of weights; the kernel; bytes read per second."""

    timings: tuple[dict[str, Any], ...]
    kernel: str
    bandwidth: float


@dataclass(frozen=True)
class Comparisons:
    """How a cell compares with others, on the same items; `reports.comparisons` fills it in.

    rivals: the cell itself is not among them. "reference": full precision. "ptq", "control": for QAT, the best PTQ and the
    best PTQ of a model that was fine-tuned on as many tokens of the same text, both by perplexity. "uniform": for a cell
    whose layers differ in their bits, the same method at the same size with the same bits for all.

    changes: by metric and rival; the rival "best" is the cell with the metric's best value, of the same scheme and seed.
    best: the metrics in which the cell has the best value, and another cell is told apart from it. ties: those in which the
    cell is not told apart from the best, and those in which it is the best and no other cell is told apart from it.
    flips: changed answers against full precision, by task.
    """

    rivals: dict[str, Cell] = field(default_factory=dict)
    changes: dict[tuple[str, str], Interval] = field(default_factory=dict)
    best: frozenset[str] = frozenset()
    ties: frozenset[str] = frozenset()
    flips: dict[str, Flips] = field(default_factory=dict)


@dataclass(eq=False)
class Cell:
    """One cell of the matrix. state: "done", "failed" or "missing"; `reason` says why.

    kind: of methods.core.recipe.CHAIN_KINDS, empty in a matrix of an older version. module, options: of the last step.
    departures, provenance: of the run and of its evaluations. samples: the items of each metric that has some.
    """

    model: str
    scheme: str
    method: str
    seed: int
    kind: str
    path: str = ""
    module: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    as_in_paper: bool | None = None
    state: str = "done"
    reason: str = ""
    run: Run = field(default_factory=Run)
    metrics: dict[str, Measurement] = field(default_factory=dict)
    samples: dict[str, tuple[Stratum, ...]] = field(default_factory=dict)
    speed: Speed | None = None
    departures: list[str] = field(default_factory=list)
    provenance: list[dict[str, Any]] = field(default_factory=list)
    comparisons: Comparisons = field(default_factory=Comparisons)

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
    def gamma(self) -> float | str | None:
        """The factor of the min-max scale, or "search"; None for a method that has none."""
        if "gamma" not in self.options:
            return None
        return "search" if self.options.get("scale") == "search" else self.options["gamma"]

    @property
    def scores(self) -> dict[str, str]:
        """The metric that each task is judged by."""
        return {entry.over[0]: name for name, entry in self.metrics.items() if len(entry.over) == 1}

    @property
    def zero_shot_flips(self) -> dict[str, Flips]:
        """Flips of the tasks that have no column of their own in the main table, as MMLU has one."""
        return {task: flips for task, flips in self.comparisons.flips.items() if is_part(self.scores[task])}

    def value(self, name: str) -> float:
        """A metric's value, or a fact of the run, by its name; NaN if it is not known."""
        if name in self.metrics:
            return self.metrics[name].value
        return getattr(self.run, name, NAN) if name in REGISTER else NAN

    def change(self, metric: str, rival: str) -> Interval | None:
        """The change of a metric from a rival's."""
        return self.comparisons.changes.get((metric, rival))

    def record_missing(self, reason: str, state: str = "missing") -> None:
        """Record a missing result; failed outranks missing."""
        if self.state == "done" or (state == "failed" and self.state == "missing"):
            self.state, self.reason = state, reason
        elif state == self.state:
            self.reason += f"; {reason}"


def read_matrix(path: Path) -> dict[str, Any]:
    """`matrix.json` as the workflow writes it. ValueError if it is something else.

    In a file of an older version the cells have no kind and no steps; here both are empty.
    """
    matrix = read_json(path)
    if not {"name", "cells", "evaluations", "config"} <= matrix.keys():
        raise ValueError(f"{path} is not a matrix.json: it has {', '.join(matrix)}")
    return matrix | {"cells": [{"kind": "", "steps": []} | cell for cell in matrix["cells"]]}


def read_cells(matrix: dict[str, Any], folder: Path) -> list[Cell]:
    """The cells in the matrix's order, not yet compared. What was scored by another protocol than the rest is left out."""
    cells = [_read_cell(entry, folder, matrix) for entry in matrix["cells"]]
    _drop_other_protocols(cells)
    return cells


def _read_cell(entry: dict[str, Any], tree: Path, matrix: dict[str, Any]) -> Cell:
    folder = tree / entry["path"]
    cell = Cell(**{key: entry[key] for key in ("model", "scheme", "method", "seed", "path", "kind")})
    cell.as_in_paper = entry.get("as_in_paper")
    if entry["steps"]:
        cell.module, cell.options = entry["steps"][-1]["module"], entry["steps"][-1]["options"]
    record = _read(folder / "run.json")
    if record is None:
        scheme = matrix["config"]["schemes"][cell.scheme]
        if failure := _failure(entry, tree):
            cell.record_missing(failure, "failed")
        elif "average_bits" in scheme.get("weights", {}) and not (folder.parents[1] / "allocation.json").is_file():
            cell.record_missing("it waits for the bits of its layers: there is no allocation.json")
        else:
            cell.record_missing(f"the cell {NOT_RUN}")
    elif reason := mismatch(record, entry, matrix["config"]):
        cell.record_missing(reason)
    else:
        cell.run = read_run(record, folder)
        cell.departures = [*(record["allocation"] or {"departures": []})["departures"], *record["departures"]]
        cell.provenance = [record["provenance"]]
        for evaluation, options in matrix["evaluations"].items():
            _read_result(cell, evaluation, options, folder / "evals", record["checkpoint_sha256"])
    return cell


def _read_result(cell: Cell, evaluation: str, options: dict[str, Any], folder: Path, checkpoint_sha256: str) -> None:
    """Add an evaluation's result to its cell, or record why it is missing."""
    failure, items = folder / f"{evaluation}.failed.json", folder / f"{evaluation}.parquet"
    result = _read(folder / f"{evaluation}.json")
    if failed := _read(failure):
        cell.record_missing(f"{evaluation}: {_error(failed)}", "failed")
    elif result is None:
        cell.record_missing(f"{evaluation} {NOT_RUN}")
    elif result["checkpoint_sha256"] != checkpoint_sha256:
        cell.record_missing(f"{evaluation} is of an older checkpoint")
    elif result["options"] != options:
        cell.record_missing(f"{evaluation} was made with another configuration")
    elif not items.is_file() and any(map(_has_items, result["metrics"].items())):
        cell.record_missing(f"{items.name}, the values of {evaluation} item by item, is not there")
    else:
        try:
            _add_result(cell, evaluation, result, items)
        except ValueError as error:
            cell.record_missing(f"{evaluation} cannot be read: {error}")


def _has_items(metric: tuple[str, dict[str, Any]]) -> bool:
    """Whether a metric of a result file is made of what its per-item file has."""
    name, entry = metric
    return "over" in entry or "items" in entry or find(name).machine_dependent


def _add_result(cell: Cell, evaluation: str, result: dict[str, Any], items: Path) -> None:
    samples = read_samples(items, result["metrics"]) if items.is_file() else {}
    timings = read_timings(items) if items.is_file() and not samples else ()
    cell.samples |= samples
    cell.departures += result["departures"]
    cell.provenance += [result["provenance"]] if "provenance" in result else []
    if timings:
        cell.speed = Speed(timings, result["data"]["kernel"] or "", result["data"]["bandwidth"])
    about = {key: result[key] for key in ("protocol", "partial", "seconds")} | {"evaluation": evaluation}
    for name, metric in result["metrics"].items():
        number = {key: metric[key] for key in ("value", "stderr", "unit", "higher_is_better")}
        over, change = tuple(metric.get("over", ())), metric.get("items", {}).get("change", "")
        cell.metrics[name] = Measurement(**number, over=over, change=change, **about)


def _drop_other_protocols(cells: Sequence[Cell]) -> None:
    """Take out the results that were scored otherwise than full precision's, or without it the model's first ones."""
    expected: dict[tuple[str, str], tuple[str, str]] = {}
    for cell in sorted(cells, key=lambda cell: not cell.is_reference):
        what = "full precision" if cell.is_reference else f"{cell.scheme} {cell.method}"
        for name, entry in list(cell.metrics.items()):
            protocol, whose = expected.setdefault((cell.model, name), (entry.protocol, what))
            if entry.protocol != protocol:
                del cell.metrics[name]
                cell.samples.pop(name, None)
                cell.record_missing(f"{entry.evaluation} was scored as {entry.protocol}, {whose} as {protocol}")


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _failure(entry: dict[str, Any], tree: Path) -> str:
    """Why a cell without a run failed: the first failure among its steps. Empty if none has failed.

    A step before the last one has the folder of the shorter recipe that ends with it. An older matrix.json does not name it.
    """
    for number, step in enumerate(entry["steps"], 1):
        folder = tree / step.get("path", entry["path"])
        failed = None if (folder / "run.json").is_file() else _read(folder / "failed.json")
        if failed and folder != tree / entry["path"]:
            return f"step {number} of {len(entry['steps'])}, {step['method']}, failed: {_error(failed)}"
    failed = _read(tree / entry["path"] / "failed.json")
    return _error(failed) if failed else ""


def _error(failed: dict[str, Any]) -> str:
    """What a failed.json says."""
    return failed["error"] + (f" (log: {failed['log']})" if failed.get("log") else "")
