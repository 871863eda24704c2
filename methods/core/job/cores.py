"""The cores of this process. No torch: Snakemake asks for them every time it starts."""

from __future__ import annotations

import os


def available_cores() -> int:
    """How many cores this process may use; those of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
