"""Resources of a job: how the machine's cores are shared among jobs."""

from __future__ import annotations

import math
import os

MOST_THREADS = 16  # more cores hardly speed up one process


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(side_by_side: int, claimed: int) -> dict[str, int]:
    """Cores of a job: "threads" of the `claimed` ones of `snakemake --cores`, and the "torch_threads" it computes with.

    Torch processes that together have more threads than there are cores slow each other several-fold. So the jobs of a model
    share the real cores, `side_by_side` of them at a time, and each claims of Snakemake all that keeps others away.
    """
    real = available_cores()
    jobs = min(claimed, real, side_by_side)
    threads = math.ceil(claimed / jobs)
    if claimed <= real:
        threads = min(threads, MOST_THREADS)
    return {"threads": threads, "torch_threads": min(threads, real // jobs)}
