"""How long the report of a large matrix takes, and how large its page is.

python -m tests.bench.report [--cells 500]

The results are generated: 5 models of 30 blocks, 10 schemes, and the methods that make up the cells, half of which train.
Each has 271 windows of perplexity and of divergence, 100 questions of each of eight tasks and 1,425 of MMLU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from evals import metric
from evals.zero_shot import EIGHT, SIX
from methods.core.recipe import chain
from tests.bench.table import Row, record

WINDOWS, QUESTIONS, MMLU = 271, 100, 1425
TOKENS = {"dataset": "training", "samples": 32, "sequence_length": 256, "batch_size": 4}  # of a training
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write_results(folder: Path, count: int) -> Path:
    """A result tree of `count` cells; returns its matrix.json."""
    generator = np.random.default_rng(0)
    models, schemes = [f"model-{i}" for i in range(5)], {"unquantized": {}}
    schemes |= {f"w{b}-g{g}": {"weights": {"bits": b, "group_size": g}} for b in (2, 3, 4, 5, 6) for g in (64, 128)}
    methods = [f"method-{i}" for i in range(-(-(count - 5) // 50))]
    names = [(m, "unquantized", "full_precision") for m in models]
    names += [(m, s, method) for m in models for s in list(schemes)[1:] for method in methods]
    cells = []
    base = generator.normal(3, 0.5, WINDOWS)
    for model, scheme, method in names[:count]:
        path = f"{model}/{scheme}/{method}/seed0"
        trains = method != "full_precision" and int(method.split("-")[1]) % 2 == 1
        kind = "reference" if method == "full_precision" else "qat" if trains else "ptq"
        step = {"method": method, "module": method, "options": {}, "tokens": TOKENS if trains else None}
        cell = {"model": model, "scheme": scheme, "method": method, "seed": 0, "path": path, "kind": kind}
        cell["budget"] = 8192 if trains else None
        cells.append(cell | {"steps": [step]})
        _write_cell(folder / path, cells[-1], schemes[scheme], trains, base, generator)
    config = {
        "models": {m: {} for m in models},
        "schemes": schemes,
        "calibration": {"dataset": "calibration", "samples": 32, "sequence_length": 512},
        "training": {"dataset": "training", "tokens": 8192, "sequence_length": 256, "batch_size": 4},
    }
    evaluations = {name: {} for name in ("perplexity", "zero_shot", "mmlu", "divergence", "footprint")}
    matrix = {"name": "bench", "cells": cells, "evaluations": evaluations, "config": config}
    (folder / "matrix.json").write_text(json.dumps(matrix))
    return folder / "matrix.json"


def _write_cell(folder: Path, cell: dict, scheme: dict, trains: bool, base: np.ndarray, generator) -> None:
    (folder / "evals").mkdir(parents=True)
    bits = scheme["weights"]["bits"] if scheme else 16
    provenance = {
        "date": "2026-01-01T00:00:00+00:00",
        "git_commit": "c" * 40,
        "python": "3.11",
        "versions": {"torch": "2"},
    }
    tokens = TOKENS | {"seconds": 10.0}
    layers = [
        {"layer": f"model.layers.{block}.{name}", "shape": [576, 576], "weight_error": float(e)}
        | {"format": "integer", "bits": bits}
        for block in range(30)
        for name, e in zip(LAYERS, generator.uniform(0.05, 0.3, len(LAYERS)), strict=True)
    ]
    step = {"method": cell["method"], "module": cell["method"], "kind": cell["kind"], "options": {}}
    step |= {
        "tokens": tokens if trains else None,
        "training": {"tokens": 8192, "flops": 10**13, "parameters": 10, "moved": 1.0} if trains else None,
        "seconds": {"apply": float(generator.uniform(20, 200))},
        "peak_memory_mb": {"host": float(generator.uniform(1000, 6000))},
    }
    run = {
        "scheme": scheme,
        "steps": [step],
        "chain": chain([step], None),
        "allocation": None,
        "layers": layers if scheme else [],
        "compute_dtype": "float32",
        "model": {"parameters": 100},
        "departures": [],
        "checkpoint_sha256": "a" * 64,
        "provenance": provenance | {"device": "cpu", "cores": 2, "threads": 2},
    }
    (folder / "run.json").write_text(json.dumps(run))
    if trains:
        (folder / "training").mkdir()
        losses = [json.dumps({"step": i, "loss": float(4 + generator.normal())}) for i in range(1000)]
        (folder / "training/metrics.jsonl").write_text("\n".join(losses))
    nll = base + (4 / bits) ** 2 * generator.uniform(0.05, 0.2) + generator.normal(0, 0.02, WINDOWS) if scheme else base
    kl = (nll - base) ** 2 + 0.01 * generator.uniform(0.5, 1, WINDOWS) if scheme else 0 * base
    pairing = {"column": "nll", "change": "relative"}
    perplexity = metric(np.exp(nll.mean()), 0.5, higher_is_better=False, unit="perplexity", items=pairing)
    _write_result(folder, "perplexity", {"perplexity": perplexity}, {"window": range(WINDOWS), "nll": nll})
    pairing = {"column": "kl", "change": "difference"}
    divergence = metric(kl.mean(), 0.01, higher_is_better=False, unit="nats", items=pairing)
    _write_result(folder, "divergence", {"kl_mean": divergence}, {"window": range(WINDOWS), "kl": kl})
    right = {task: generator.random(QUESTIONS) < 0.45 for task in EIGHT}
    scores = {
        f"{t}/acc": metric(np.mean(r), 0.05, higher_is_better=True, unit="share", over=[t]) for t, r in right.items()
    }
    for name, over in (("zero_shot_avg8", EIGHT), ("zero_shot_avg6", SIX)):
        mean = np.mean([right[t].mean() for t in over])
        scores[name] = metric(mean, 0.02, higher_is_better=True, unit="share", over=list(over))
    rows = [(t, t, i, bool(r)) for t, answers in right.items() for i, r in enumerate(answers)]
    _write_result(
        folder, "zero_shot", scores, dict(zip(("group", "task", "item", "right"), zip(*rows, strict=True), strict=True))
    )
    answers = generator.random(MMLU) < 0.3
    mmlu = {"mmlu_5shot": metric(answers.mean(), 0.01, higher_is_better=True, unit="share", over=["mmlu_5shot"])}
    columns = {"group": ["mmlu_5shot"] * MMLU, "task": [f"subject{i % 57}" for i in range(MMLU)]}
    _write_result(folder, "mmlu", mmlu, columns | {"item": range(MMLU), "right": answers})
    size = {"bits_per_weight": metric(bits + 0.25, higher_is_better=False, unit="bits")}
    _write_result(folder, "footprint", size | {"size_mb": metric(25 * bits, higher_is_better=False, unit="MB")})


def _write_result(folder: Path, evaluation: str, metrics: dict, items: dict | None = None) -> None:
    result = {
        "protocol": evaluation,
        "partial": False,
        "metrics": metrics,
        "departures": [],
        "options": {},
        "seconds": 1.0,
        "checkpoint_sha256": "a" * 64,
    }
    (folder / f"evals/{evaluation}.json").write_text(json.dumps(result))
    if items:
        pd.DataFrame({k: list(v) for k, v in items.items()}).to_parquet(folder / f"evals/{evaluation}.parquet")


def building(folder: Path, cells: int) -> list[str]:
    """The arguments that build the report of so many cells, whose results are written into the folder."""
    matrix = write_results(folder / "results", cells)
    return ["-m", "reports.build", str(matrix), "--output", str(folder / "summary.md")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = building(Path(folder), args.cells)
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        size = Path(folder, "summary.html").stat().st_size / 1e6
    print(f"page of {size:.1f} MB (goal 10)")
    record([Row(f"report of {args.cells} cells", seconds, args.cells / 50, "10 s for 500 cells", 1)])


if __name__ == "__main__":
    main()
