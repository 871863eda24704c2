"""When a job that can be resumed saves its state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 60  # between two saves, at least
SHARE = 0.05  # of the time may go into saving


class Saves:
    """A minute apart, or as far as keeps the time that saving takes to its share."""

    def __init__(self):
        self.last, self.pause = time.perf_counter(), SECONDS

    def due(self) -> bool:
        return time.perf_counter() - self.last >= self.pause

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, which is timed."""
        began = time.perf_counter()
        yield
        self.last = time.perf_counter()
        self.pause = max(SECONDS, (self.last - began) / SHARE)
