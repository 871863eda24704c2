"""Resources of a job: how the machine's cores are shared among jobs."""

from __future__ import annotations

import math

from methods.core.job.cores import available_cores

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
