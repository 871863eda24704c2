"""Energy of a computation: from the machine's own counters where it has them, else an estimate, always called that.

Counters (RAPL of the processor and its memory, NVML of a GPU) are read by Zeus. The estimate adds up what Horowitz gives for
45 nm (Computing's energy problem, ISSCC 2014): it says how bytes and operations compare, not what this machine draws.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import cache

# Horowitz 2014, figure 1.1.9, 45 nm at 0.9 V, in pJ: a DRAM access of 64 bits 1300 (the lower end), a multiplication and an
# addition in fp16 (1.1 + 0.4) and fp32 (3.7 + 0.9). For bf16, which it does not have, fp16's.
PJ_PER_BYTE = 1300 / 8
PJ_PER_MAC = {2: 1.1 + 0.4, 4: 3.7 + 0.9}
SOURCE = "Horowitz, ISSCC 2014: 45 nm, 162.5 pJ a byte of DRAM, 1.5 pJ a 16-bit and 4.6 pJ a 32-bit multiply-add"


@cache
def _monitor():
    """Zeus' monitor; None where the machine has no counters that this process may read."""
    with contextlib.redirect_stdout(io.StringIO()):
        from zeus.monitor import ZeusMonitor

        monitor = ZeusMonitor()
    return monitor if monitor.gpu_indices or monitor.cpu_indices else None


@contextlib.contextmanager
def measured() -> Iterator[Callable[[], float | None]]:
    """Gives a function that afterwards returns the joules of all processors, memories and GPUs with a counter in the block.

    All that the machine does in that time is in it. None if there is no counter, or if the block was over before the
    counters moved.
    """
    monitor, found = _monitor(), []
    if monitor:
        monitor.begin_window("run")
    yield lambda: sum(found) or None
    if monitor:
        window = monitor.end_window("run")
        parts = (window.gpu_energy, window.cpu_energy, window.dram_energy)
        found += [float(joules) for part in parts if part for joules in part.values()]


def estimated(bytes_read: float, operations: float, itemsize: int) -> float:
    """Joules of reading so many bytes from memory and of so many multiply-adds in floats of `itemsize` bytes."""
    return (bytes_read * PJ_PER_BYTE + operations * PJ_PER_MAC[itemsize]) * 1e-12
