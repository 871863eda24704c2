"""Resources of a job: the machine's cores, shared among jobs, and what a cluster is asked for.

python -m workflow.resources --configfile mine.yaml      what each kind of job will ask for, before anything is submitted
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from tabulate import tabulate

from methods.core.job.cores import available_cores
from workflow.errors import ConfigError
from workflow.matrix import Cell, Matrix, load
from workflow.needs import Needs, of_evaluations, of_step
from workflow.shapes import UnknownShape

MOST_THREADS = 16  # with more, one process is hardly faster


def cores(side_by_side: int, claimed: int) -> dict[str, int]:
    """Cores of a job: the "threads" that it claims of the `claimed` ones of `snakemake --cores`, and its "torch_threads".

    Torch processes that together have more threads than there are cores slow each other several-fold. So `side_by_side` jobs
    of a model share the real cores, and each claims a part of Snakemake's cores that leaves no room for another job.
    """
    real = available_cores()
    jobs = min(claimed, real, side_by_side)
    threads = math.ceil(claimed / jobs)
    if claimed <= real:
        threads = min(threads, MOST_THREADS)
    return {"threads": threads, "torch_threads": min(threads, real // jobs)}


def kinds(matrix: Matrix) -> Iterator[tuple[str, str, str, Needs | None]]:
    """(job, model, scheme and method, what it needs) of each kind of job; seeds are one kind. None while the model has not
    been fetched."""
    evaluated = set(matrix.cells)
    every = ((job, cell.model, *rest) for cell in matrix.jobs for job, *rest in _jobs(matrix, cell, cell in evaluated))
    yield from dict.fromkeys(every)


def _jobs(matrix: Matrix, cell: Cell, evaluated: bool) -> Iterator[tuple[str, str, Needs | None]]:
    budget = f", {cell.budget:,} tokens" if cell.budget else ""
    try:
        yield "quantize", f"{cell.scheme}, {cell.method}{budget}", of_step(matrix, cell)
        if evaluated:
            yield "evaluate", cell.scheme, of_evaluations(matrix, cell.model, cell.scheme)
    except FileNotFoundError:
        yield "all", "not fetched yet", None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.resources", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--configfile", type=Path, nargs="*", default=[], help="laid over default.yaml, as Snakemake does"
    )
    parser.add_argument("--threads", type=int, default=8, help="of a job, as the profile gives it")
    args = parser.parse_args()
    from snakemake.utils import update_config

    config: dict = {}
    try:
        for path in ("workflow/config/default.yaml", *args.configfile):
            update_config(config, yaml.safe_load(Path(path).read_text()) or {})
        matrix = load(config)
    except (ConfigError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    rows, too_large = [], 0
    try:
        every = list(kinds(matrix))
    except UnknownShape as error:
        sys.exit(f"error: nothing can be predicted of a model by its config.json: {error}")
    for job, model, what, needs in every:
        if needs is None:
            rows.append([job, model, what, *[""] * 4])
            continue
        large = needs.mem_mb() > here
        too_large += large
        memory = f"{needs.mem_mb():,}" + (" *" if large else "")
        device = f"{needs.device / 1e6:,.0f}" if needs.gpus else ""
        rows.append([job, model, what, memory, needs.gpus, device, needs.runtime(args.threads)])
    headings = ["job", "model", "scheme, method", "mem_mb", "gpu", "MB on the GPU", f"minutes, {args.threads} threads"]
    align = ("left", "left", "left", "right", "right", "right", "right")
    print(tabulate(rows, headings, tablefmt="github", colalign=align, disable_numparse=True))
    if too_large:
        print(f"\n* {too_large} kinds of jobs need more than this machine's {here:,.0f} MB: they will be killed here.")


if __name__ == "__main__":
    main()
