"""The state of a run: finished and running jobs, and about how long the rest will take.

python -m reports.status results/default

Durations are those of the jobs that have finished in this run. Evaluations of one model take about as long as each other;
of a method of which none has finished, no more is known than that it takes a while.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from reports.cells import read_matrix

STAGES = {"quantize": "run.json", "evaluate": "evals/done.json"}
QUIET = 300  # seconds without a line in its log after which a job is taken for stopped


@dataclass(frozen=True)
class Job:
    """A stage of a cell: "done", "failed", "running", "stopped" or "waiting"; seconds that it took or has taken so far.

    cell: as in matrix.json; of the job that only prepares a step for other cells, the shorter recipe that ends with it.
    """

    cell: dict[str, Any]
    stage: str
    state: str
    seconds: float = 0.0
    last: str = ""  # line of its log

    @property
    def path(self) -> str:
        return self.cell["path"]

    @property
    def module(self) -> str:
        """The module of the cell's last step, which the stage "quantize" runs."""
        return self.cell["steps"][-1]["module"] if self.cell["steps"] else self.cell["method"]


def read_jobs(folder: Path, logs: Path) -> list[Job]:
    """The jobs of a matrix, from its results and its logs: those of each cell after those of its earlier steps."""
    matrix = read_matrix(folder / "matrix.json")
    cells = {cell["path"]: cell for cell in matrix["cells"]}
    now = time.time()
    failed: set[str] = set()
    jobs = []
    for cell in _with_prefixes(matrix["cells"]):
        path, before = cell["path"], cell["steps"][-2].get("path") if len(cell["steps"]) > 1 else None
        for stage in STAGES if path in cells else ("quantize",):
            job = _job(cell, stage, folder / path, logs / matrix["name"] / path, now)
            if path in failed or (before in failed and job.state != "done"):
                job = replace(job, state="failed")  # there will be nothing to evaluate, or nothing to start from
            if job.state == "failed" and stage == "quantize":
                failed.add(path)
            jobs.append(job)
    return jobs


def _with_prefixes(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells, and before each one the shorter recipes that it starts from, as if they were cells; each path once.

    A matrix.json of an older version does not name the paths of steps.
    """
    own = {cell["path"]: cell for cell in cells}
    ordered: dict[str, dict[str, Any]] = {}
    for cell in own.values():
        for number, step in enumerate(cell["steps"][:-1], 1):
            if path := step.get("path"):
                prefix = cell | {"method": step["method"], "path": path, "steps": cell["steps"][:number]}
                ordered.setdefault(path, own.get(path, prefix))
        ordered.setdefault(cell["path"], cell)
    return list(ordered.values())


def _job(cell: dict[str, Any], stage: str, results: Path, logs: Path, now: float) -> Job:
    log, result = logs / f"{stage}.log", results / STAGES[stage]
    written = log.stat().st_mtime if log.is_file() else 0.0
    if result.is_file() and result.stat().st_mtime >= written - 60:
        benchmark = logs / f"{stage}.benchmark.tsv"
        seconds = float(benchmark.read_text().splitlines()[1].split("\t")[0]) if benchmark.is_file() else 0.0
        return Job(cell, stage, "done", seconds)
    failed = results / "failed.json" if stage == "quantize" else next(results.glob("evals/*.failed.json"), None)
    if failed and failed.is_file() and failed.stat().st_mtime >= written - 60:
        return Job(cell, stage, "failed")
    text = log.read_text(errors="replace") if log.is_file() else ""
    started = re.match(r"started (\S+)", text)
    if not started:
        return Job(cell, stage, "waiting")
    seconds = now - datetime.fromisoformat(started[1]).timestamp()
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return Job(cell, stage, "running" if now - written < QUIET else "stopped", seconds, lines[-1])


def remaining(jobs: list[Job]) -> tuple[float, list[str]]:
    """Seconds until all is done, with the jobs that run now side by side, and the names of jobs without an estimate."""
    left, unknown = 0.0, []
    for job in [j for j in jobs if j.state in ("running", "waiting", "stopped")]:
        expected = _expected(job, jobs)
        if expected is None:
            unknown.append(job.module if job.stage == "quantize" else "evaluation")
        left += max(0.0, (expected or 0.0) - (job.seconds if job.state == "running" else 0.0))
    return left / max(1, sum(j.state == "running" for j in jobs)), list(dict.fromkeys(unknown))


def _expected(job: Job, jobs: list[Job]) -> float | None:
    """Mean duration of the finished jobs that do the same with the same model."""
    like = [j for j in jobs if j.state == "done" and j.seconds and j.stage == job.stage]
    like = [j for j in like if j.cell["model"] == job.cell["model"]]
    if job.stage == "quantize":
        like = [j for j in like if j.module == job.module]
    return statistics.mean(j.seconds for j in like) if like else None


def status(jobs: list[Job]) -> str:
    """The state of every cell, and of every step that only other cells start from, and a line that sums up."""
    rows, done = [], []
    for path in dict.fromkeys(job.path for job in jobs):
        own = {job.stage: job for job in jobs if job.path == path}
        said = next((job.last for job in own.values() if job.state == "running"), "")
        rows.append([path, *(_text(own[stage], jobs) if stage in own else "" for stage in STAGES), said[:60]])
        if "evaluate" in own:
            done.append(all(job.state == "done" for job in own.values()))
    seconds, unknown = remaining(jobs)
    left = "nothing is left" if all(done) else f"{'at least' if unknown else 'about'} {_clock(seconds)} left"
    if unknown:
        left += f" (not counted, since none has finished yet: {', '.join(unknown)})"
    table = tabulate(rows, headers=["cell", *STAGES, "says"], disable_numparse=True)
    return f"{table}\n\n{sum(done)} of {len(done)} cells are done; {left}"


def _text(job: Job, jobs: list[Job]) -> str:
    if job.state == "waiting":
        return "-"
    if job.state != "running":
        return f"{job.state} {_clock(job.seconds)}" if job.seconds else job.state
    expected = _expected(job, jobs)
    return f"running {_clock(job.seconds)}" + (f" of ~{_clock(expected)}" if expected else "")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reports.status", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a result tree, as results/default")
    parser.add_argument("--logs", type=Path, help="default: logs in the folder that has results")
    args = parser.parse_args()
    logs = args.logs or Path(os.path.abspath(args.results)).parents[1] / "logs"
    try:
        print(status(read_jobs(args.results, logs)))
    except FileNotFoundError as error:
        sys.exit(f"nothing has run there yet: there is no {error.filename}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
