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
from workflow.needs import Needs, of_evaluations, of_generation, of_reference, of_sensitivity, of_step
from workflow.prepare import GENERATED
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
    return {"threads": threads, "torch_threads": min(threads, real // jobs, MOST_THREADS)}


def kinds(matrix: Matrix) -> Iterator[tuple[str, str, str, Needs | None]]:
    """(job, model, scheme and method, what it needs) of each kind of job; seeds are one kind. None while the model has not
    been fetched."""
    evaluated = set(matrix.cells)
    for model in dict.fromkeys(cell.model for cell in matrix.jobs):
        cells = [cell for cell in matrix.jobs if cell.model == model]
        try:
            found = [each for cell in cells for each in _jobs(matrix, cell, cell in evaluated)]
            every = [*_prepared(matrix, model, cells), *found]
        except FileNotFoundError:
            every = [("all", "not fetched yet", None)]
        yield from dict.fromkeys((job, model, *rest) for job, *rest in every)


def _prepared(matrix: Matrix, model: str, cells: list[Cell]) -> Iterator[tuple[str, str, Needs]]:
    """What the jobs of a model read that a model has computed."""
    for scheme in dict.fromkeys(cell.scheme for cell in cells if cell.scheme in matrix.mixed):
        yield "sensitivity", scheme, of_sensitivity(matrix, model, scheme)
    if any(matrix.tokens(cell) == GENERATED for cell in cells):
        yield "generate", f"{matrix.generated:,} tokens", of_generation(matrix, model)
    for name in matrix.references:
        yield "reference", name, of_reference(matrix, model, matrix.configuration.evaluations[name])


def _jobs(matrix: Matrix, cell: Cell, evaluated: bool) -> Iterator[tuple[str, str, Needs]]:
    budget = f", {cell.budget:,} tokens" if cell.budget else ""
    yield "quantize", f"{cell.scheme}, {cell.method}{budget}", of_step(matrix, cell)
    if evaluated:
        yield "evaluate", cell.scheme, of_evaluations(matrix, cell.model, cell.scheme)


def here(matrix: Matrix) -> Matrix:
    """The matrix as this machine runs it. Only if a model may have a GPU, torch is imported, which takes a second."""
    if all(matrix.configuration.models[model].gpus == 0 for model in matrix.models):
        return matrix
    from methods.core.job.runtime import device

    return matrix if device().type == "cuda" else matrix.without_gpus


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.resources", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--configfile", type=Path, nargs="*", default=[], help="laid over default.yaml, as Snakemake does"
    )
    parser.add_argument("--threads", type=int, default=8, help="of a job, as the profile gives it")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU; what needs more is marked")
    args = parser.parse_args()
    from snakemake.utils import update_config

    config: dict = {}
    try:
        for path in ("workflow/config/default.yaml", *args.configfile):
            update_config(config, yaml.safe_load(Path(path).read_text()) or {})
        matrix = load(config)
    except (ConfigError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    memory_here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    on_gpu = 1000 * args.gpu_memory if args.gpu_memory else math.inf
    rows, too_large, too_large_for_gpu = [], 0, 0
    try:
        every = list(kinds(matrix))
        local = {(job, model, what): needs for job, model, what, needs in kinds(here(matrix))}
    except UnknownShape as error:
        sys.exit(f"error: nothing can be predicted of a model by its config.json: {error}")
    for job, model, what, needs in every:
        if needs is None:
            rows.append([job, model, what, *[""] * 4])
            continue
        large = local[job, model, what].mem_mb() > memory_here
        large_for_gpu = needs.gpus > 0 and needs.device / 1e6 > on_gpu
        too_large, too_large_for_gpu = too_large + large, too_large_for_gpu + large_for_gpu
        memory = f"{needs.mem_mb():,}" + (" *" if large else "")
        device = (f"{needs.device / 1e6:,.0f}" if needs.gpus else "") + (" **" if large_for_gpu else "")
        rows.append([job, model, what, memory, needs.gpus, device, needs.runtime(args.threads)])
    headings = ["job", "model", "scheme, method", "mem_mb", "gpu", "MB on the GPU", f"minutes, {args.threads} threads"]
    align = ("left", "left", "left", "right", "right", "right", "right")
    print(tabulate(rows, headings, tablefmt="github", colalign=align, disable_numparse=True))
    if too_large:
        print(
            f"\n* {too_large} kinds of jobs need more than this machine's {memory_here:,.0f} MB: they will be killed here."
        )
    if too_large_for_gpu:
        print(
            f"\n** {too_large_for_gpu} kinds of jobs need more than the {on_gpu:,.0f} MB of a GPU: they will fail there."
        )


if __name__ == "__main__":
    main()
