"""Reading a result tree: one row per cell of the matrix, with its state and, if it ran, its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

REFERENCE = "full_precision"


def read_matrix(path: str | Path) -> dict[str, Any]:
    """`matrix.json` as the workflow writes it. ValueError if it is something else."""
    matrix = json.loads(Path(path).read_text())
    if not {"name", "cells", "config"} <= matrix.keys():
        raise ValueError(f"{path} is not a matrix.json: it has {', '.join(matrix)}")
    return matrix


def read_cells(matrix: dict[str, Any], folder: Path) -> pd.DataFrame:
    """One row per cell, in the matrix's order.

    `state` is "done", "failed" or "missing" and `reason` says why; metrics have columns of their own, `<metric>` and
    `<metric>_stderr`, and `change` with `change_low`, `change_high` compares perplexity with full precision.
    """
    rows = [_read_cell(cell, folder / cell["path"], matrix["config"]) for cell in matrix["cells"]]
    _compare_with_reference(rows)
    for row in rows:
        row.pop("nll", None)
    return pd.DataFrame(rows)


def _read_cell(cell: dict[str, Any], folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {k: cell[k] for k in ("model", "scheme", "method", "seed")} | {"state": "done", "reason": ""}
    run = _read(folder / "run.json")
    if run is None:
        return row | _why(folder / "failed.json")
    if not _made_with(run, cell, config):
        return row | {"state": "missing", "reason": "its checkpoint was made with another configuration"}
    start, training = run["init_from"], run["training"]
    row |= {
        "bits_per_weight": run["size"]["bits_per_weight"],
        "size_mb": run["size"]["size_mb"],
        "seconds": run["seconds"]["quantize"] + (start["seconds"] if start else 0) + _generating(run),
        "host_memory_mb": run["peak_memory_mb"]["host"],
        "device_memory_mb": run["peak_memory_mb"].get("device", float("nan")),
        "training_tokens": training["tokens"] if training else float("nan"),
        "trained_on": run["tokens"]["dataset"] if training else "",
        "trained_share": training["parameters"] / run["size"]["parameters"] if training else float("nan"),
        "moved": training["moved"] if training else float("nan"),
        "codes_changed": _codes_changed(run),
        "init_from": start["method"] if start else "",
        "compute_dtype": run["compute_dtype"],
        "departures": list(run["departures"]),
        "provenance": run["provenance"],
    }
    for evaluation, entry in config["evaluations"].items():
        path = folder / "evals" / f"{evaluation}.json"
        result = _read(path)
        if result is None:
            row |= _why(path.with_suffix(".failed.json"), evaluation)
            continue
        if result["checkpoint_sha256"] != run["checkpoint_sha256"]:
            row |= {"state": "missing", "reason": f"{evaluation} is of an older checkpoint"}
            continue
        if not _agree(entry.get("options", {}), result["options"]):
            row |= {"state": "missing", "reason": f"{evaluation} was made with another configuration"}
            continue
        row["departures"] += result["departures"]
        row[f"{evaluation}_protocol"] = result["protocol"]
        row[f"{evaluation}_partial"] = result["partial"]
        row[f"{evaluation}_seconds"] = result["seconds"]
        for name, metric in result["metrics"].items():
            row[name], row[f"{name}_stderr"] = metric["value"], metric["stderr"]
        if "perplexity" in result["metrics"]:
            row["nll"] = pd.read_parquet(path.with_suffix(".parquet"))["nll"].to_numpy()
    return row


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


def _compare_with_reference(rows: list[dict[str, Any]]) -> None:
    """Relative change of perplexity against full precision with its 95 % interval, paired by window.

    The difference of two cells on the same windows is far more certain than either perplexity: its standard error comes
    from the per-window differences.
    """
    references = {r["model"]: r for r in rows if r["method"] == REFERENCE and "nll" in r}
    for row in rows:
        reference = references.get(row["model"])
        if reference is None or row is reference or "nll" not in row:
            continue
        if row["perplexity_protocol"] != reference["perplexity_protocol"]:
            continue
        difference = row["nll"] - reference["nll"]
        mean, half = difference.mean(), 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
        names = ("change", "change_low", "change_high")
        row |= {n: float(np.expm1(v)) for n, v in zip(names, (mean, mean - half, mean + half), strict=True)}
