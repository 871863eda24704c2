"""Reading a result tree: one row per cell of the matrix, with its state and, if it ran, its numbers and comparisons."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evals.core.statistics import flips, mean_difference

REFERENCE = "full_precision"
# Metrics that are means over windows: the column of the per-item file, and what makes a difference of its means a change.
WINDOWED = {"perplexity": ("nll", math.expm1), "kl_mean": ("kl", None)}


def read_matrix(path: str | Path) -> dict[str, Any]:
    """`matrix.json` as the workflow writes it. ValueError if it is something else."""
    matrix = json.loads(Path(path).read_text())
    if not {"name", "cells", "evaluations", "config"} <= matrix.keys():
        raise ValueError(f"{path} is not a matrix.json: it has {', '.join(matrix)}")
    return matrix


def read_cells(matrix: dict[str, Any], folder: Path) -> pd.DataFrame:
    """One row per cell, in the matrix's order.

    `state` is "done", "failed" or "missing" and `reason` says why. A metric has the columns `<metric>` and
    `<metric>_stderr`, and for each rival, what it is compared with item by item, an Interval in `<metric>_against_<rival>`
    (of the relative change for perplexity, of the difference for others): `reference`, full precision, and `ptq`, the best
    method of the same scheme and seed that does not train, for those that do. `flips` are those against full precision, by
    task, and `scores` is the metric that a task is judged by. ValueError if two results of one protocol are of other items.
    """
    rows = [_read_cell(cell, folder / cell["path"], matrix) for cell in matrix["cells"]]
    for row in rows:
        _drop_other_protocols(row, _reference(row, rows))
    for row in rows:
        rivals = {"reference": _reference(row, rows), "ptq": _best_ptq(row, rows)}
        for name, rival in rivals.items():
            if rival is not None:
                row |= _compare(row, rival, name)
        row["rival"] = rivals["ptq"]["method"] if rivals["ptq"] else ""
        row["extra_seconds"] = row["seconds"] - rivals["ptq"]["seconds"] if rivals["ptq"] else math.nan
    for row in rows:
        row.pop("items", None)
        metrics = row.pop("metrics", {})
        row["scores"] = {m["over"][0]: name for name, m in metrics.items() if len(m.get("over", ())) == 1}
    return pd.DataFrame(rows)


def _read_cell(cell: dict[str, Any], folder: Path, matrix: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {k: cell[k] for k in ("model", "scheme", "method", "seed")} | {"state": "done", "reason": ""}
    run = _read(folder / "run.json")
    if run is None:
        return row | _why(folder / "failed.json")
    if not _made_with(run, cell, matrix["config"]):
        return row | {"state": "missing", "reason": "its checkpoint was made with another configuration"}
    start, training = run["init_from"], run["training"]
    row |= {
        "seconds": run["seconds"]["quantize"] + (start["seconds"] if start else 0) + _generating(run),
        "host_memory_mb": run["peak_memory_mb"]["host"],
        "device_memory_mb": run["peak_memory_mb"].get("device", float("nan")),
        "training_tokens": training["tokens"] if training else float("nan"),
        "trained_on": run["tokens"]["dataset"] if training else "",
        "trained_share": training["parameters"] / run["model"]["parameters"] if training else float("nan"),
        "moved": training["moved"] if training else float("nan"),
        "codes_changed": _codes_changed(run),
        "init_from": start["method"] if start else "",
        "compute_dtype": run["compute_dtype"],
        "departures": list(run["departures"]),
        "provenance": run["provenance"],
        "metrics": {},
        "items": {},
    }
    for evaluation, options in matrix["evaluations"].items():
        path = folder / "evals" / f"{evaluation}.json"
        result, failure = _read(path), path.with_suffix(".failed.json")
        if result is None or failure.is_file():
            row |= _why(failure, evaluation)
        elif result["checkpoint_sha256"] != run["checkpoint_sha256"]:
            row |= {"state": "missing", "reason": f"{evaluation} is of an older checkpoint"}
        elif result["options"] != options:
            row |= {"state": "missing", "reason": f"{evaluation} was made with another configuration"}
        else:
            _add_result(row, evaluation, result, path.with_suffix(".parquet"))
    return row


def _add_result(row: dict[str, Any], evaluation: str, result: dict[str, Any], items: Path) -> None:
    row["departures"] += result["departures"]
    row |= {f"{evaluation}_{key}": result[key] for key in ("protocol", "partial", "seconds")}
    if items.is_file():
        row["items"][evaluation] = pd.read_parquet(items)
    for name, metric in result["metrics"].items():
        row["metrics"][name] = metric | {"evaluation": evaluation, "protocol": result["protocol"]}
        row |= {name: metric["value"], f"{name}_stderr": metric["stderr"]}
        row |= {f"{name}_protocol": result["protocol"], f"{name}_partial": result["partial"]}


def _reference(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The full-precision row of the same model."""
    if row["method"] == REFERENCE:
        return None
    return next((r for r in rows if r["method"] == REFERENCE and r["model"] == row["model"] and "metrics" in r), None)


def _drop_other_protocols(row: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Take results that were scored otherwise than the reference's out of a row: they must not share a column."""
    for name, metric in list(row.get("metrics", {}).items()) if reference else ():
        expected = reference["metrics"].get(name, metric)["protocol"]
        if metric["protocol"] != expected:
            for key in (name, *(f"{name}_{part}" for part in ("stderr", "protocol", "partial"))):
                row.pop(key)
            del row["metrics"][name]
            reason = f"{metric['evaluation']} was scored as {metric['protocol']}, full precision as {expected}"
            row |= {"state": "missing", "reason": reason}


def _best_ptq(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """For a row that was trained: of the others of its model, scheme and seed, the best by perplexity that was not."""
    if "perplexity" not in row or math.isnan(row["training_tokens"]):
        return None
    same = [r for r in rows if all(r[k] == row[k] for k in ("model", "scheme", "seed")) and "perplexity" in r]
    rivals = [r for r in same if math.isnan(r["training_tokens"]) and r["method"] != REFERENCE]
    return min(rivals, key=lambda r: r["perplexity"], default=None)


def _compare(row: dict[str, Any], rival: dict[str, Any], name: str) -> dict[str, Any]:
    """Columns that compare a row with another on the same items, where both have them under the same protocol."""
    found: dict[str, Any] = {}
    for metric, mine in row.get("metrics", {}).items():
        theirs = rival["metrics"].get(metric)
        if theirs is None or theirs["protocol"] != mine["protocol"]:
            continue
        items = [r["items"].get(mine["evaluation"]) for r in (row, rival)]
        if any(table is None for table in items):
            continue
        if metric in WINDOWED:
            column, function = WINDOWED[metric]
            both = items[0].merge(items[1], on="window", validate="one_to_one")
            interval = mean_difference((both[f"{column}_x"] - both[f"{column}_y"]).to_numpy())
            found[f"{metric}_against_{name}"] = interval.map(function) if function else interval
        elif "over" in mine:
            pairs = [_paired(*items, group) for group in mine["over"]]
            interval = mean_difference(*(a.astype(float) - b for a, b in pairs))
            if len(pairs) == 1:
                changed = flips(pairs[0][1], pairs[0][0])
                interval = replace(interval, p=changed.p)
                if name == "reference":
                    found.setdefault("flips", {})[mine["over"][0]] = changed
            found[f"{metric}_against_{name}"] = interval
    return found


def _paired(mine: pd.DataFrame, theirs: pd.DataFrame, group: str) -> tuple[np.ndarray, np.ndarray]:
    """Which questions of a group each of two systems answered right, question by question."""
    mine, theirs = (t[t["group"] == group] for t in (mine, theirs))
    both = mine.merge(theirs, on=["task", "item"], validate="one_to_one")
    if not len(mine) == len(theirs) == len(both):
        raise ValueError(f"two results of {group} under one protocol are not of the same items")
    return both["right_x"].to_numpy(bool), both["right_y"].to_numpy(bool)


def _made_with(run: dict[str, Any], cell: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a run is what the configuration asks for; a result tree may hold older ones."""
    try:
        return (
            run["module"] == cell["module"]
            and run["scheme"] == config["schemes"][cell["scheme"]]
            and run["options"] == cell["options"]
            and (run["init_from"] or {}).get("method") == cell["init_from"]
            and (run["tokens"] is None or _agree(_budget(run, cell, config), run["tokens"]))
        )
    except KeyError:  # written by an older version
        return False


def _budget(run: dict[str, Any], cell: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the configuration gives a cell to read, as a run records it: in samples, not in tokens."""
    section = config["training" if run["training"] else "calibration"] | {"dataset": cell["dataset"]}
    section.pop("gradient_checkpointing", None)  # changes no number
    if "tokens" in section:
        section["samples"] = section.pop("tokens") // section["sequence_length"]
    return section


def _generating(run: dict[str, Any]) -> float:
    """Seconds it took to generate what the cell was trained on."""
    return float((run["tokens"] or {}).get("seconds", 0))


def _codes_changed(run: dict[str, Any]) -> float:
    """Share of the integer codes that training changed, over all layers; NaN for a cell that was not trained to codes."""
    rows = [(math.prod(r["shape"]), r["codes_changed"]) for r in run["layers"] if "codes_changed" in r]
    return sum(n * share for n, share in rows) / sum(n for n, _ in rows) if rows else float("nan")


def _agree(configured: dict[str, Any], actual: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return a == b or (isinstance(a, str) and isinstance(b, float) and float(a) == b)

    return all(same(value, actual[key]) for key, value in configured.items())


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _why(path: Path, what: str = "") -> dict[str, str]:
    failed = _read(path)
    if failed is None:
        return {"state": "missing", "reason": f"{what or 'the cell'} has no result: it has not run, or it was killed"}
    log = f" (log: {failed['log']})" if failed.get("log") else ""
    return {"state": "failed", "reason": f"{what + ': ' if what else ''}{failed['error']}{log}"}
