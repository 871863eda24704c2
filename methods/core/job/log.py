"""What a method reports about its own run: facts per layer, departures from the plan, where the time went."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from methods.core.job import ranks


def synchronize() -> None:
    """Kernels on an accelerator run on after they were called; a timer must not book them on what comes next."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class RunLog:
    """Collects what goes into `run.json`; prints to standard error as it comes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder  # where a training keeps its metrics and its state
        self.training: dict[str, Any] | None = None  # steps, tokens, trained parameters, share of them that moved
        self.layers: dict[str, dict[str, Any]] = defaultdict(dict)
        self.departures: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.earlier_seconds = 0.0  # of a training that was killed and goes on here

    def info(self, message: str) -> None:
        if ranks.leads():
            tqdm.write(message, file=sys.stderr)

    def layer(self, name: str, **facts: Any) -> None:
        """Facts about one layer, for example `output_error=0.01`."""
        self.layers[name].update(facts)

    def departure(self, message: str) -> None:
        """Something did not go as configured; it is marked in the report."""
        self.departures.append(message)
        self.info(f"departure from the plan: {message}")

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the block's wall seconds to `seconds[name]`."""
        synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize()
            self.seconds[name] += time.perf_counter() - start

    def progress(self, items: Iterable, what: str, unit: str = "it") -> tqdm:
        """A progress bar over `items` on standard error."""
        options = {"mininterval": 2, "dynamic_ncols": True, "file": sys.stderr, "disable": not ranks.leads()}
        return tqdm(items, desc=what, unit=unit, **options)
