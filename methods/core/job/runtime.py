"""The machine a job runs on: threads, device, compute dtype, seeds, memory, provenance."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.core.job import ranks
from methods.core.job.cores import available_cores
from methods.core.job.files import read_json
from methods.core.job.sources import commit

M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = 1, -1, -2, -4  # parameters of mallopt, from malloc.h
# Logits that are made fp32 or fp64 at a time: 8 MB in fp32, which stay in a CPU's cache; a GPU is idle in pieces so small.
LOGITS = {"cpu": 2_097_152, "cuda": 67_108_864}
VERSIONED = ("torch", "transformers", "tokenizers", "compressed-tensors", "datasets", "numpy")


def set_up(threads: int | None, seed: int) -> None:
    """Use so many threads (see `threads_of`), divided among the processes of the job; seed every generator."""
    torch.set_num_threads(max(1, threads_of(threads) // ranks.count()))
    ranks.connect()
    _keep_freed_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def threads_of(asked: int | None) -> int:
    """As many threads as asked for, all by default, but never more than the machine gives this process."""
    cores = available_cores()
    return max(1, min(asked or cores, cores))


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the system at once.

    It returns large blocks by default, and every new activation then costs page faults: a training step of SmolLM2-135M
    on two cores took 1.4 times as long. An aligned tensor leaves a remainder of some bytes, which must not wait in a fast bin
    (nor in a thread's cache, see the Snakefile) until something small lies there for good: another tensor of the same size
    would not fit between such pieces, and a step took up to 14 % more memory, a different amount in each run.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MXFAST, 0)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def release_freed_memory() -> None:
    """Return to the system what was freed, so that a second model, of other sizes, does not come on top of the first one."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def device() -> torch.device:
    """The accelerator if there is one, else the CPU. The environment variable PTQAT_DEVICE overrides it."""
    if name := os.environ.get("PTQAT_DEVICE"):
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def rows_at_a_time(logits: torch.Tensor) -> int:
    """How many positions of logits (..., vocabulary) to work on at a time: all of them in fp32 are a run's largest tensor."""
    return max(1, LOGITS.get(logits.device.type, LOGITS["cpu"]) // logits.shape[-1])


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in records and in config.json: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype that the model in `folder` is stored in, by its config.json."""
    return getattr(torch, read_json(Path(folder) / "config.json")["dtype"])


def compute_dtype(folder: str | Path) -> torch.dtype:
    """The dtype that the model in `folder` is stored in, where the machine multiplies it natively; else float32.

    So the weights are never rounded to less than they are stored in. Emulated bf16 was 7 times slower than fp32 on AVX2.
    """
    stored = stored_dtype(folder)
    if device().type == "cuda":
        native = stored == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = stored == torch.bfloat16 and device().type == "cpu" and _cpu_multiplies_bf16()
    return stored if native else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Not where ATEN_CPU_CAPABILITY restricts torch to AVX2, as it does to try what another machine would do."""
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return able and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def peak_memory_mb() -> dict[str, float]:
    """Highest resident memory of this process and, on an accelerator, highest allocated memory there; MB = 10^6 bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if device().type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated() / 1e6
    return {k: round(v, 1) for k, v in peak.items()}


def provenance() -> dict[str, Any]:
    """What a reader needs to judge or repeat a number: code, versions, machine, date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit("methods", "evals", "workflow"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Name of what computes: the GPU, or the CPU with the instructions that torch uses of it."""
    where = device()
    if where.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{where.type}: {model}, {torch.backends.cpu.get_cpu_capability()}"
