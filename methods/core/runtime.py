"""The machine a job runs on: threads, device, compute dtype, seeds, memory, provenance."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import random
import resource
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

VERSIONED = ("torch", "transformers", "tokenizers", "compressed-tensors", "datasets", "numpy")


def set_up(threads: int | None, seed: int) -> None:
    """Use `threads` cores but never more than the machine gives this process; seed every generator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, min(threads or cores, cores)))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def device() -> torch.device:
    """The accelerator if there is one, else the CPU. The environment variable PTQAT_DEVICE overrides it."""
    if name := os.environ.get("PTQAT_DEVICE"):
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16 where the machine multiplies it natively, else float32 (emulated bf16 was 7 times slower on AVX2)."""
    where = device().type
    if where == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if where == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def peak_memory_mb() -> dict[str, float]:
    """Highest resident memory of this process and, on an accelerator, highest allocated memory there; MB = 10^6 bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if device().type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated() / 1e6
    return {k: round(v, 1) for k, v in peak.items()}


def provenance() -> dict[str, Any]:
    """What a reader needs to judge or repeat a number: code, versions, machine, date."""
    where = device()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"{where.type}: {_cpu_name()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compute_dtype": str(compute_dtype()).removeprefix("torch."),
    }


def _git_commit() -> str | None:
    """Commit of the checkout this file is in, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
