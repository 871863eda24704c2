"""Energy of a computation: from the machine's own counters where it has them, else an estimate.

Zeus reads the counters (RAPL of the processor and its memory, NVML of a GPU). The estimate adds up Horowitz's energies per
operation for 45 nm (Computing's energy problem, ISSCC 2014). It says how bytes and operations compare, not what this machine
draws, so its results are named estimates.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import cache

# Horowitz 2014, figure 1.1.9, 45 nm at 0.9 V, in pJ. A DRAM access of 64 bits takes 1300 (the lower end). A multiplication
# and an addition take 1.1 + 0.4 in fp16 and 3.7 + 0.9 in fp32. The figure has no bf16, for which fp16's energies stand. A
# product of 8-bit integers takes 0.2, its addition to 32 bits 0.1.
PJ_PER_BYTE = 1300 / 8
PJ_PER_MAC = {1: 0.2 + 0.1, 2: 1.1 + 0.4, 4: 3.7 + 0.9}
SOURCE = "Horowitz, ISSCC 2014: 45 nm, 162.5 pJ a byte of DRAM; a multiply-add in 8 bits 0.3, 16 1.5, 32 4.6 pJ"


@cache
def _monitor():
    """Zeus's monitor; None where the machine has no counters that this process may read."""
    with contextlib.redirect_stdout(io.StringIO()):
        from zeus.monitor import ZeusMonitor

        monitor = ZeusMonitor()
    return monitor if monitor.gpu_indices or monitor.cpu_indices else None


@contextlib.contextmanager
def measured() -> Iterator[Callable[[], float | None]]:
    """Yields a function that, after the block, returns the joules of all processors, memories and GPUs that have a counter.

    The counters include everything that the machine does in that time. The function returns None if there is no counter. A
    block that ends before a counter moves has none of its joules, and the next has them: sum over blocks, then divide.
    """
    monitor, joules = _monitor(), []
    if monitor:
        monitor.begin_window("run")
    yield lambda: sum(joules) if monitor else None
    if monitor:
        window = monitor.end_window("run")
        parts = (window.gpu_energy, window.cpu_energy, window.dram_energy)
        joules += [float(value) for part in parts if part for value in part.values()]


def estimated(bytes_read: float, operations: float, itemsize: int) -> float:
    """Joules of reading `bytes_read` from memory and of `operations` multiply-adds of numbers of `itemsize` bytes."""
    return (bytes_read * PJ_PER_BYTE + operations * PJ_PER_MAC[itemsize]) * 1e-12
