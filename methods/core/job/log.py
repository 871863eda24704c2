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
        self.training: dict[str, Any] | None = None
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

    def trained(
        self,
        *,
        steps: int,
        tokens: int,
        flops: int,
        parameters: int,
        moved: float,
        schedule: dict[str, Any],
        learning_rates: Iterable[float],
        **facts: Any,
    ) -> None:
        """A training is over: of so many optimizer steps on so many tokens, a token counted each time that it was read.

        parameters: how many values were trained; moved: the share of a sample of them that is not what it was.
        """
        self.training = {
            "steps": steps,
            "tokens": tokens,
            "flops": flops,
            "parameters": parameters,
            "moved": round(moved, 4),
            "schedule": schedule,
            "learning_rates": sorted(set(learning_rates)),
            **facts,
        }
        self.info(f"trained {parameters:,} parameters on {tokens:,} tokens; {moved:.0%} of a sample moved")

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
