"""Reading a result tree: one row per cell of the matrix, with its state and, if it ran, its numbers and comparisons."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from methods.core.job.files import read_json
from methods.core.statistics import Interval, Part, flips, mean_differences

REFERENCE = "full_precision"
# Kinds of quantized rows, by what was trained on the way to them: nothing, full precision only, or what quantizes.
QUANTIZED = {"ptq": "PTQ", "control_ptq": "fine-tune, then PTQ", "qat": "QAT"}
TIMED = "throughput"  # the evaluation whose items are timings, not windows or questions
# Metrics that are means over windows: the column of the per-item file, and what makes a difference of its means a change.
WINDOWED = {"perplexity": ("nll", lambda nats: float(np.expm1(nats))), "kl_mean": ("kl", None)}
# What a run itself tells, as `read_cells` names it: unit, and whether more is better.
FACTS = {
    "seconds": ("s", False),
    "host_memory_mb": ("MB", False),
    "device_memory_mb": ("MB", False),
    "training_tokens": ("tokens", False),
    "moved": ("share", True),
    "weight_error": ("relative", False),
}

Side = Sequence[Any]  # rows of one method, one per seed
Halves = tuple[Side, Side]  # what is taken for the items with even places and for those with odd ones


@dataclass(frozen=True)
class Sample:
    """A metric's values item by item, one array per stratum, and digests of which items these are."""

    strata: tuple[np.ndarray, ...]
    items: tuple[str, ...]


def read_matrix(path: str | Path) -> dict[str, Any]:
    """`matrix.json` as the workflow writes it. ValueError if it is something else."""
    matrix = read_json(path)
    if not {"name", "cells", "evaluations", "config"} <= matrix.keys():
        raise ValueError(f"{path} is not a matrix.json: it has {', '.join(matrix)}")
    return matrix


def read_cells(matrix: dict[str, Any], folder: Path) -> pd.DataFrame:
    """One row per cell, in the matrix's order.

    `state` is "done", "failed" or "missing" and `reason` says why. `metrics` has the result files' metrics by name, each with
    its evaluation, protocol and whether it is partial; their values and standard errors are columns too, `<metric>` and
    `<metric>_stderr`. Columns with an Interval compare a metric with that of another row item by item (the relative change
    for perplexity, the difference for others), `<metric>_against_<rival>`:

        reference   full precision
        best        the best of the same model, scheme and seed
        ptq         for QAT: the best PTQ by perplexity; its method is in `rival`
        control     for QAT: the best PTQ of a model that was fine-tuned on as many tokens of the same text; in `control`
        uniform     for rows whose layers differ in their bits: the same method at the same size with the same bits for all;
                    its scheme is in `uniform`

    `kind` is "reference", "control" (a trained model that is not quantized), one of QUANTIZED, or "" for what has not run.
    `training_tokens` and `seconds` are of all steps of a cell's chain, `trained_on` is the text of the last that trained.

    `best` are the metrics that a row is the best in, `ties` those in which it is not told apart from the best, or is the best
    and not told apart from any other. `flips` are those against full precision, by task, and `scores` is the metric that a
    task is judged by. `bits` are those of each quantized layer, `timings` what throughput timed. `samples` is what `compare`
    reads. ValueError if two results of one protocol are of other items.
    """
    rows = [_read_cell(cell, folder / cell["path"], matrix) for cell in matrix["cells"]]
    _drop_other_protocols(rows)
    schemes: dict[tuple, list[dict[str, Any]]] = {}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        schemes.setdefault((row["model"], row["scheme"]), []).append(row)
        groups.setdefault((row["model"], row["scheme"], row["seed"]), []).append(row)
    pairs: list[tuple[dict, str, dict, str]] = []
    for row in rows:
        group = groups[row["model"], row["scheme"], row["seed"]]
        reference, uniform = reference_of(row, rows), _uniform(row, rows)
        ptq, control = _rivals(row, schemes[row["model"], row["scheme"]])
        for metric, entry in row["metrics"].items():
            if "/" in metric or metric not in row["samples"]:
                continue  # of single tasks, the flips say more
            best = _best(metric, entry, group)
            rivals = {"reference": reference, "ptq": ptq, "control": control, "uniform": uniform}
            rivals["best"] = None if best is row else best
            pairs += [(row, metric, rival, name) for name, rival in rivals.items() if rival]
        row["rival"] = ptq["method"] if ptq else ""
        row["control"] = control["method"] if control else ""
        row["uniform"] = uniform["scheme"] if uniform else ""
        row["scores"] = {m["over"][0]: name for name, m in row["metrics"].items() if len(m.get("over", ())) == 1}
        row["flips"] = _flips(row, reference) if reference else {}
    intervals = compare_all([(([row],) * 2, ([rival],) * 2, metric) for row, metric, rival, _ in pairs])
    for (row, metric, _, name), interval in zip(pairs, intervals, strict=True):
        row[f"{metric}_against_{name}"] = interval
    for group in groups.values():
        _mark_best(group)
    return pd.DataFrame(rows)


def compare(mine: Side, theirs: Side, metric: str) -> Interval | None:
    """How a metric of rows differs from that of others, paired item by item; seeds are drawn as items are.

    None if a row lacks the metric or the protocols differ. ValueError if the items differ under one protocol.
    """
    return compare_all([((mine,) * 2, (theirs,) * 2, metric)])[0]


def compare_all(comparisons: Sequence[tuple[Halves, Halves, str]]) -> list[Interval | None]:
    """`compare` for many at once, which is much faster, and with sides that may be other rows for each half of the items."""
    parts = [_parts(*comparison) for comparison in comparisons]
    intervals = iter(mean_differences([p for p in parts if p]))
    found: list[Interval | None] = []
    for (mine, theirs, metric), part in zip(comparisons, parts, strict=True):
        interval = next(intervals) if part else None
        if interval and metric in WINDOWED:
            function = WINDOWED[metric][1]
            interval = interval.map(function) if function else interval
        elif interval and len(part) == len(part[0]) == 1 and mine[0] is mine[1] and theirs[0] is theirs[1]:
            right = [side[0][0]["samples"][metric].strata[0] for side in (theirs, mine)]
            interval = replace(interval, p=flips(*right).p)
        found.append(interval)
    return found


def _parts(mine: Halves, theirs: Halves, metric: str) -> list[Part] | None:
    """My side less theirs, by stratum, seed and item; what has a single seed is summed to one part."""
    rows = [row for side in (*mine, *theirs) for row in side]
    if not all((*mine, *theirs)) or any(metric not in row["samples"] for row in rows):
        return None
    if len({row["metrics"][metric]["protocol"] for row in rows}) > 1:
        return None
    if len({row["samples"][metric].items for row in rows}) > 1:
        raise ValueError(f"two results of {metric} under one protocol are not of the same items")
    parts = []
    for sign, (even, odd) in ((1, mine), (-1, theirs)):
        halves = [(even, slice(None))] if even is odd else [(even, slice(0, None, 2)), (odd, slice(1, None, 2))]
        for side, items in halves:
            part = [np.zeros((len(side), len(stratum))) for stratum in side[0]["samples"][metric].strata]
            for seed, row in enumerate(side):
                for values, stratum in zip(part, row["samples"][metric].strata, strict=True):
                    values[seed, items] = sign * stratum[items]
            parts.append(part)
    single = [sum(strata) for strata in zip(*(part for part in parts if len(part[0]) == 1), strict=True)]
    return ([single] if single else []) + [part for part in parts if len(part[0]) > 1]


def tidy(cells: pd.DataFrame) -> pd.DataFrame:
    """Every number of every cell in a row of its own, for a spreadsheet, a data frame or `reports.compare`."""
    rows = []
    for cell in cells.to_dict("records"):
        key = {k: cell[k] for k in ("model", "scheme", "method", "seed", "state")}
        for metric, entry in cell["metrics"].items():
            row = key | {"evaluation": entry["evaluation"], "metric": metric}
            row |= {k: entry[k] for k in ("value", "stderr", "unit", "higher_is_better", "protocol", "partial")}
            interval = cell.get(f"{metric}_against_reference")
            if isinstance(interval, Interval):
                row |= {"change": interval.value, "change_low": interval.low, "change_high": interval.high}
            rows.append(row)
        for fact, (unit, more_is_better) in FACTS.items():
            if not math.isnan(cell.get(fact, math.nan)):
                row = key | {
                    "evaluation": "run",
                    "metric": fact,
                    "value": float(cell[fact]),
                    "stderr": None,
                    "unit": unit,
                }
                rows.append(row | {"higher_is_better": more_is_better, "protocol": "", "partial": False})
        if not cell["metrics"]:
            rows.append(key)
    columns = ["model", "scheme", "method", "seed", "state", "evaluation", "metric", "value", "stderr", "unit"]
    columns += ["higher_is_better", "protocol", "partial", "change", "change_low", "change_high"]
    return pd.DataFrame(rows, columns=columns).astype({"value": float, "stderr": float})


def _read_cell(cell: dict[str, Any], folder: Path, matrix: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {k: cell[k] for k in ("model", "scheme", "method", "module", "seed", "path")}
    row |= {"state": "done", "reason": ""}
    row |= {"unquantized": not matrix["config"]["schemes"][cell["scheme"]]}
    row |= {"metrics": {}, "samples": {}, "departures": [], "layers": [], "losses": [], "provenance": []}
    row |= {"bits": {}, "timings": [], "kernel": "", "bandwidth": math.nan, "gamma": ""}
    row |= {"kind": "", "trained_on": "", "as_in_paper": cell.get("as_in_paper")}
    run = _read(folder / "run.json")
    if run is None:
        mixed = "average_bits" in matrix["config"]["schemes"][cell["scheme"]].get("weights", {})
        if mixed and not (folder.parents[1] / "allocation.json").is_file():
            return row | {
                "state": "missing",
                "reason": "it waits for the bits of its layers: there is no allocation.json",
            }
        return row | _why(folder / "failed.json")
    if not _made_with(run, cell, matrix["config"]):
        return row | {"state": "missing", "reason": "its checkpoint was made with another configuration"}
    start, training = run["init_from"], run["training"]
    steps = _steps(run, quantizes=not row["unquantized"])
    trainings = [step["training"] for step in steps if step.get("training")]
    weights = run["scheme"].get("weights", {})
    allocated = run["allocation"] or {"seconds": 0, "departures": []}
    row |= {
        "seconds": run["seconds"]["quantize"]
        + (start["seconds"] if start else 0)
        + _generating(run)
        + allocated["seconds"],
        "kind": _kind(steps),
        "host_memory_mb": run["peak_memory_mb"]["host"],
        "device_memory_mb": run["peak_memory_mb"].get("device", math.nan),
        "training_tokens": sum(t["tokens"] for t in trainings) if trainings else math.nan,
        "trained_on": trainings[0]["dataset"] if trainings else "",
        "trained_share": training["parameters"] / run["model"]["parameters"] if training else float("nan"),
        "moved": training["moved"] if training else float("nan"),
        "codes_changed": _over_layers(run, "codes_changed"),
        "weight_error": _over_layers(run, "weight_error"),
        "init_from": start["method"] if start else "",
        "compute_dtype": run["compute_dtype"],
        "departures": [*allocated["departures"], *run["departures"]],
        "provenance": [run["provenance"]],
        "checkpoint_sha256": run["checkpoint_sha256"],
        "layers": [(layer["layer"], layer["weight_error"]) for layer in run["layers"] if layer["bits"]],
        "bits": {layer["layer"]: layer["bits"] for layer in run["layers"] if layer["bits"]},
        "parameters": run["model"]["parameters"],
        "apart_from_bits": {"symmetric": weights.get("symmetric", True)}
        | {kind: run["scheme"].get(kind) for kind in ("activations", "kv_cache")},
        "gamma": _gamma(run["options"]),
        "losses": _losses(folder / "training/metrics.jsonl") if training else [],
    }
    for evaluation, options in matrix["evaluations"].items():
        path = folder / "evals" / f"{evaluation}.json"
        result, failure = _read(path), path.with_suffix(".failed.json")
        items = path.with_suffix(".parquet")
        if result is None or failure.is_file():
            _lacks(row, **_why(failure, evaluation))
        elif result["checkpoint_sha256"] != run["checkpoint_sha256"]:
            _lacks(row, f"{evaluation} is of an older checkpoint")
        elif result["options"] != options:
            _lacks(row, f"{evaluation} was made with another configuration")
        elif not items.is_file() and (
            evaluation == TIMED or any("over" in m or name in WINDOWED for name, m in result["metrics"].items())
        ):
            _lacks(row, f"{items.name}, the values of {evaluation} item by item, is not there")
        else:
            _add_result(row, evaluation, result, items)
    return row


def _steps(run: dict[str, Any], quantizes: bool) -> list[dict[str, Any]]:
    """The steps of a run's chain, the last first: whether each quantizes, and the tokens and text that it was trained on."""
    training = run["training"] and {"tokens": run["training"]["tokens"], "dataset": run["tokens"]["dataset"]}
    steps = [{"quantizes": quantizes, "training": training}]
    start = run["init_from"]
    while start:
        steps.append(start)
        start = start.get("init_from")
    return steps


def _kind(steps: list[dict[str, Any]]) -> str:
    """A row's kind, by what was trained in which step."""
    trained = [step["quantizes"] for step in steps if step.get("training")]
    if not steps[0]["quantizes"]:
        return "control" if trained else "reference"
    return "qat" if any(trained) else "control_ptq" if trained else "ptq"


def _lacks(row: dict[str, Any], reason: str, state: str = "missing") -> None:
    """A row without one of its results; that one failed says more than that others have not run."""
    if row["state"] == "done" or (state == "failed" and row["state"] == "missing"):
        row |= {"state": state, "reason": reason}
    elif state == row["state"]:
        row["reason"] += f"; {reason}"


def _add_result(row: dict[str, Any], evaluation: str, result: dict[str, Any], items: Path) -> None:
    row["departures"] += result["departures"]
    row["provenance"] += [result["provenance"]] if "provenance" in result else []
    row |= {f"{evaluation}_{key}": result[key] for key in ("protocol", "partial", "seconds")}
    if evaluation == TIMED:
        row |= {"timings": pq.read_table(items).to_pylist(), "bandwidth": result["data"]["bandwidth"]}
        row["kernel"] = result["data"]["kernel"] or ""
    groups = _groups(items) if items.is_file() and evaluation != TIMED else {}
    for name, metric in result["metrics"].items():
        about = {"evaluation": evaluation, "protocol": result["protocol"], "partial": result["partial"]}
        row["metrics"][name] = metric | about
        row |= {name: metric["value"], f"{name}_stderr": metric["stderr"]}
        strata = [groups[name]] if name in WINDOWED and groups else [groups[over] for over in metric.get("over", ())]
        if strata:
            row["samples"][name] = Sample(*zip(*strata, strict=True))


def _groups(path: Path) -> dict[str, tuple[np.ndarray, str]]:
    """The values of a per-item file and a digest of which items they are of, by metric for windows, else by group."""
    table = {name: column.to_numpy() for name, column in zip(*_columns(path), strict=True)}
    if "window" in table:
        digest = hashlib.sha256(table["window"].tobytes()).hexdigest()
        return {
            name: (table[column].astype(float), digest) for name, (column, _) in WINDOWED.items() if column in table
        }
    found = {}
    for group in dict.fromkeys(table["group"]):
        at = table["group"] == group
        items = "\n".join(table["task"][at]).encode() + table["item"][at].tobytes()
        found[group] = table["right"][at].astype(float), hashlib.sha256(items).hexdigest()
    return found


def _columns(path: Path) -> tuple[list[str], list[pa.ChunkedArray]]:
    """Names and columns of a per-item file, by pyarrow: pandas takes four times as long for tables so small."""
    names = ("window", "nll", "kl", "group", "task", "item", "right")
    with pq.ParquetFile(path) as file:
        table = file.read(columns=[name for name in file.schema_arrow.names if name in names])
    return table.column_names, table.columns


def _gamma(options: dict[str, Any]) -> float | str:
    """A method's factor of the min-max scale, or "search"; empty if it has none."""
    if "gamma" not in options:
        return ""
    return "search" if options.get("scale") == "search" else options["gamma"]


def _uniform(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """For a row whose layers differ in their bits: the same method with the same bits for all at the same size, to 1 %."""
    if len(set(row["bits"].values())) < 2 or "bits_per_weight" not in row["metrics"]:
        return None
    alike = ("model", "method", "seed", "apart_from_bits")
    away = {
        r["scheme"]: (abs(r["bits_per_weight"] / row["bits_per_weight"] - 1), r)
        for r in rows
        if len(set(r["bits"].values())) == 1 and "bits_per_weight" in r and all(r.get(k) == row[k] for k in alike)
    }
    distance, nearest = min(away.values(), key=lambda found: found[0], default=(math.inf, None))
    return nearest if distance <= 0.01 else None


def reference_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The full-precision row of the same model; None for itself."""
    if row["method"] == REFERENCE:
        return None
    return next((r for r in rows if r["method"] == REFERENCE and r["model"] == row["model"] and r["metrics"]), None)


def _drop_other_protocols(rows: list[dict[str, Any]]) -> None:
    """Take results that were scored otherwise than full precision's (or the model's first) out: they share no column."""
    expected: dict[tuple[str, str], tuple[str, str]] = {}
    for row in sorted(rows, key=lambda row: row["method"] != REFERENCE):
        what = "full precision" if row["method"] == REFERENCE else f"{row['scheme']} {row['method']}"
        for name, metric in list(row["metrics"].items()):
            protocol, whose = expected.setdefault((row["model"], name), (metric["protocol"], what))
            if metric["protocol"] != protocol:
                for key in (name, f"{name}_stderr"):
                    row.pop(key)
                del row["metrics"][name]
                row["samples"].pop(name, None)
                _lacks(row, f"{metric['evaluation']} was scored as {metric['protocol']}, {whose} as {protocol}")


def _best(metric: str, entry: dict[str, Any], group: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a scheme's rows, the one with the best value of a metric under the same protocol."""
    same = [r for r in group if r["metrics"].get(metric, {}).get("protocol") == entry["protocol"]]
    return (max if entry["higher_is_better"] else min)(same, key=lambda r: r[metric])


def _mark_best(group: list[dict[str, Any]]) -> None:
    """Fill in `best` and `ties` of a scheme's rows."""
    for row in group:
        row |= {"best": set(), "ties": set()}
    for metric in {metric for row in group for metric in row["metrics"]}:
        others = [row for row in group if isinstance(row.get(f"{metric}_against_best"), Interval)]
        if not others:
            continue
        higher = others[0]["metrics"][metric]["higher_is_better"]
        tied = [row for row in others if row[f"{metric}_against_best"].verdict(higher) == "tie"]
        best = _best(metric, others[0]["metrics"][metric], group)
        best["ties" if len(tied) == len(others) else "best"].add(metric)
        for row in tied:
            row["ties"].add(metric)


def by_method(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in their seeds together."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def best_method(methods: Iterable[Side], windows: slice | None = None) -> Side:
    """The method with the lowest perplexity (mean over seeds), of all text or of some of its windows."""

    def loss(row: dict[str, Any]) -> float:
        value = row["perplexity"] if windows is None else row["samples"]["perplexity"].strata[0][windows].mean()
        return math.inf if math.isnan(value) else value

    return min(methods, key=lambda side: np.mean([loss(row) for row in side]), default=[])


def controls_of(qat: dict[str, Any], methods: Iterable[Side]) -> list[Side]:
    """Of methods that quantize a fine-tuned model, those whose model read what a QAT row did: as many tokens of its text."""
    return [side for side in methods if all(side[0][key] == qat[key] for key in ("trained_on", "training_tokens"))]


def _rivals(row: dict[str, Any], scheme: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """For a QAT row the best PTQ and the best of its controls, of the same seed if there is one."""
    if row["kind"] != "qat" or "perplexity" not in row["metrics"]:
        return [None, None]
    ptq, controls = (
        by_method(r for r in scheme if r["kind"] == kind and "perplexity" in r["metrics"]).values()
        for kind in ("ptq", "control_ptq")
    )
    sides = best_method(ptq), best_method(controls_of(row, controls))
    return [next((r for r in side if r["seed"] == row["seed"]), side[0] if side else None) for side in sides]


def _flips(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Flips against full precision by task. ValueError if the questions differ."""
    found = {}
    for task, metric in row["scores"].items():
        if metric not in row["samples"] or metric not in reference["samples"]:
            continue
        mine, theirs = row["samples"][metric], reference["samples"][metric]
        if mine.items != theirs.items:
            raise ValueError(f"two results of {task} under one protocol are not of the same items")
        found[task] = flips(theirs.strata[0], mine.strata[0])
    return found


def _losses(path: Path) -> list[float]:
    """The training loss of every step."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [step["loss"] for step in json.loads(f"[{','.join(lines)}]")]


def _made_with(run: dict[str, Any], cell: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a run is what the configuration asks for; a result tree may hold older ones."""
    try:
        return (
            run["module"] == cell["module"]
            and run["scheme"] == config["schemes"][cell["scheme"]]
            and run["options"] == cell["options"]
            and (run["init_from"] or {}).get("method") == cell["init_from"]
            and (run["tokens"] is None or _agree(_budget(run, cell, config), run["tokens"]))
            and (run["allocation"] is None or _agree(_allocated_by(config), run["allocation"]["tokens"]))
        )
    except (KeyError, TypeError):  # written by an older version
        return False


def _budget(run: dict[str, Any], cell: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the configuration gives a cell to read, as a run records it: in samples, not in tokens."""
    section = config["training" if run["training"] else "calibration"] | {"dataset": cell["dataset"]}
    section.pop("gradient_checkpointing", None)  # changes no number
    if "tokens" in section:
        section["samples"] = section.pop("tokens") // section["sequence_length"]
    return section


def _allocated_by(config: dict[str, Any]) -> dict[str, Any]:
    """The tokens by which the configuration allocates bits, as a run records them."""
    return config["allocation"] | {"dataset": config["calibration"]["dataset"]}


def _generating(run: dict[str, Any]) -> float:
    """Seconds it took to generate what the cell was trained on."""
    return float((run["tokens"] or {}).get("seconds", 0))


def _over_layers(run: dict[str, Any], fact: str) -> float:
    """Mean of a fact over all weights of the quantized layers; NaN where no layer has it."""
    rows = [(math.prod(r["shape"]), r[fact]) for r in run["layers"] if r["bits"] and fact in r]
    return sum(n * value for n, value in rows) / sum(n for n, _ in rows) if rows else float("nan")


def _agree(configured: dict[str, Any], actual: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return a == b or (isinstance(a, str) and isinstance(b, float) and float(a) == b)

    return all(same(value, actual[key]) for key, value in configured.items())


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _why(path: Path, what: str = "") -> dict[str, str]:
    failed = _read(path)
    if failed is None:
        return {"state": "missing", "reason": f"{what or 'the cell'} has no result: it has not run, or it was killed"}
    log = f" (log: {failed['log']})" if failed.get("log") else ""
    return {"state": "failed", "reason": f"{what + ': ' if what else ''}{failed['error']}{log}"}
