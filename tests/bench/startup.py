"""How long Snakemake takes to plan the default configuration and one of 5,000 cells, and what importing torch alone takes.

python -m tests.bench.startup        (a minute)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.bench.table import Row, record

PLAN = ["-m", "snakemake", "-n", "-q", "--cores", "8"]
MANY = {"models": ["smollm2-135m"], "schemes": ["w4-g64", "w3-g64", "w2-g64", "w3-pc"], "methods": ["peqa", "lr_qat"]}


def planning(folder: Path, cells: int) -> list[str]:
    """The arguments of a dry run of so many cells, a multiple of 8, whose configuration is written into the folder."""
    seeds = range(cells // (len(MANY["schemes"]) * len(MANY["methods"])))
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump({"name": "many", "matrix": [MANY | {"seeds": list(seeds)}]}))
    return [*PLAN, "--configfile", str(path), "--", "reports/summary.md"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "dry run of the default configuration": [*PLAN, "reports/summary.md"],
            "dry run of 5,000 cells": planning(Path(folder), 5000),
            "snakemake --version": ["-m", "snakemake", "--version"],
            "import torch": ["-c", "import torch"],
            "python -m methods --help": ["-m", "methods", "--help"],
        }
        seconds = {name: measured(arguments) for name, arguments in commands.items()}
    for name, values in seconds.items():
        print(f"{name:40} median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f}")
    default, large, snakemake, *_ = map(statistics.median, seconds.values())
    record(
        [
            Row("dry run of the default configuration", default, 2, "2 s", 1),
            Row("dry run of 5,000 cells", large, 10, "10 s", 1),
            Row("dry run of the default configuration", default, snakemake, "snakemake --version"),
        ]
    )


def measured(arguments: list[str]) -> list[float]:
    """Seconds of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
