"""Memory that was predicted for each step and each checkpoint's evaluations, against what they took.

python -m tests.bench.needs [results/default ...]        (seconds; of all finished results, unless some are named)

What is predicted is what a cluster is asked for, head room included, but not for Snakemake's own processes. What a process
took is its own record: run.json, and the last of a checkpoint's results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import pandas as pd

from workflow import needs
from workflow.matrix import Matrix, load


def rows(folder: Path) -> list[dict]:
    """One for each step and each set of evaluations of the tree in `folder` that has been run, on the host."""
    config = json.loads((folder / "matrix.json").read_text())["config"]
    runs = {path.parent: json.loads(path.read_text()) for path in folder.glob("*/*/*/*/run.json")}
    # What ran without a GPU, or without bf16, is compared with that, whatever its configuration and this machine have.
    matrix = load(config)
    if not any("device" in run["chain"]["peak_memory_mb"] for run in runs.values()):
        matrix = matrix.without_gpus
    multiplied_bf16 = any(run["compute_dtype"] == "bfloat16" for run in runs.values())
    with patch.object(needs, "_multiplies_bf16", lambda: multiplied_bf16):
        return _compared(folder, runs, matrix)


def _compared(folder: Path, runs: dict[Path, dict], matrix: Matrix) -> list[dict]:
    found = []
    for cell in matrix.jobs:
        place = folder / cell.path
        if place in runs:
            took = runs[place]["steps"][-1]["peak_memory_mb"]["host"]
            found.append(row(cell.model, cell.scheme, cell.method, took, needs.of_step(matrix, cell)))
        if (place / "evals/done.json").exists():
            files = [path for path in (place / "evals").glob("*.json") if path.name != "done.json"]
            took = max(json.loads(path.read_text())["peak_memory_mb"]["host"] for path in files)
            asked = needs.of_evaluations(matrix, cell.model, cell.scheme)
            found.append(row(cell.model, cell.scheme, "evaluations", took, asked))
    return found


def row(model: str, scheme: str, what: str, took: float, predicted: needs.Needs) -> dict:
    asked = predicted.host / 1e6
    return {
        "model": model,
        "scheme": scheme,
        "step": what,
        "took MB": round(took),
        "predicted MB": round(asked),
        "more": f"{100 * (asked / took - 1):+.0f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.needs", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", default=sorted(Path("results").glob("*")))
    found = []
    for folder in parser.parse_args().results:
        found += rows(folder)
    print(pd.DataFrame(found).to_markdown(index=False, disable_numparse=True) if found else "no results here")


if __name__ == "__main__":
    main()
