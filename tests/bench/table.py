"""What the benchmarks found, in one table: ours beside a rival or a limit, their ratio, and the goal for it.

python -m tests.bench.table        (at once; of each benchmark its last run, which may be of another day and machine)

A benchmark leaves its rows here by `record`; the table is reports/published/bench/summary.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from methods.core.job import runtime
from methods.core.job.cores import available_cores
from methods.core.job.files import ROOT, read_json, write_json

FOLDER = ROOT / "reports/published/bench"
HEADER = """\
# Benchmarks

Seconds of ours and of a rival or a limit, measured in one run; the ratio is ours to the other's, so lower is faster. Goals
in bold are missed. `python -m tests.bench.NAME` measures one anew, `make bench` all of them.
"""


@dataclass(frozen=True)
class Row:
    """What was done, our seconds and the other's, who the other is, and how large the ratio may be; None: no goal is set."""

    what: str
    ours: float
    other: float
    against: str
    goal: float | None = None


def record(rows: Iterable[Row]) -> None:
    """Keep what the benchmark that runs has found, in place of its last run, and print the table of it."""
    name = Path(sys.argv[0]).stem
    found = {
        "command": shlex.join(["python", "-m", f"tests.bench.{name}", *sys.argv[1:]]),
        "machine": f"{runtime.processor()}, {available_cores()} cores, torch {torch.__version__}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "rows": [asdict(row) for row in rows],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / f"{name}.json", found)
    print(table([found]))
    (FOLDER / "summary.md").write_text(summary())


def summary() -> str:
    """The page of all that was recorded."""
    runs = [read_json(path) for path in sorted(FOLDER.glob("*.json"))]
    lines = [f"- `{run['command']}`: {run['machine']}, {run['date']}" for run in runs]
    return "\n".join([HEADER, table(runs), "", *lines, ""])


def table(runs: list[dict]) -> str:
    """Markdown of the rows of some runs."""
    rows = []
    for row in (Row(**row) for run in runs for row in run["rows"]):
        ratio = row.ours / row.other
        goal = "" if row.goal is None else f"at most {row.goal:g}"
        rows.append(
            {
                "what": row.what,
                "ours s": f"{row.ours:.3g}",
                "other s": f"{row.other:.3g}",
                "rival or limit": row.against,
                "ratio": f"{ratio:.2f}",
                "goal": f"**{goal}**" if row.goal is not None and ratio > row.goal else goal,
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    print(summary())
