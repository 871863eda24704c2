"""What the benchmarks found, in one table: ours beside a rival or a limit, their ratio, and the goal for it.

python -m tests.bench.table        (at once; of each benchmark its last run, which may be of another day and machine)

A benchmark leaves its rows here by `record`; the table is reports/published/bench/summary.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
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
GROWTH = """\
## Growth

Seconds of stages at growing sizes, their slope in log-log, and that of the operations that they must do; in bold where the
first is more than a tenth above the second.

![Seconds of each stage against width, depth, tokens and cells](growth.png)
"""
STEEPER = 0.1


@dataclass(frozen=True)
class Row:
    """What was done, our seconds and the other's, who the other is, and how large the ratio may be; None: no goal is set."""

    what: str
    ours: float
    other: float
    against: str
    goal: float | None = None


@dataclass(frozen=True)
class Growth:
    """What a stage takes at some sizes of something, and how many operations, in any unit."""

    stage: str
    axis: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    operations: Sequence[float]

    def slope(self, values: Sequence[float]) -> float:
        """Of the line through the values at all sizes, in log-log."""
        return float(np.polyfit(np.log(self.sizes), np.log(values), 1)[0])


def record(rows: Iterable[Row], growths: Iterable[Growth] = ()) -> None:
    """Keep what the benchmark that runs has found, in place of its last run, and print the table of it."""
    name = Path(sys.argv[0]).stem
    found = {
        "command": shlex.join(["python", "-m", f"tests.bench.{name}", *sys.argv[1:]]),
        "machine": f"{runtime.processor()}, {available_cores()} cores, torch {torch.__version__}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "rows": [asdict(row) for row in rows],
        "growths": [asdict(growth) for growth in growths],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / f"{name}.json", found)
    print(table([found]) if found["rows"] else growth_table([found]))
    (FOLDER / "summary.md").write_text(summary())


def summary() -> str:
    """The page of all that was recorded."""
    runs = [read_json(path) for path in sorted(FOLDER.glob("*.json"))]
    lines = [f"- `{run['command']}`: {run['machine']}, {run['date']}" for run in runs]
    growth = [GROWTH, growth_table(runs), ""] if any(run.get("growths") for run in runs) else []
    return "\n".join([HEADER, table(runs), "", *growth, *lines, ""])


def growth_table(runs: list[dict]) -> str:
    """Markdown of how stages grow."""
    rows = []
    for growth in (Growth(**growth) for run in runs for growth in run.get("growths", [])):
        slope, expected = growth.slope(growth.seconds), growth.slope(growth.operations)
        rows.append(
            {
                "stage": growth.stage,
                "with": growth.axis,
                "sizes": ", ".join(f"{size:,}" for size in growth.sizes),
                "seconds": ", ".join(f"{seconds:.3g}" for seconds in growth.seconds),
                "slope": f"**{slope:.2f}**" if slope > expected + STEEPER else f"{slope:.2f}",
                "of operations": f"{expected:.2f}",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


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
