"""One run at a time in a folder; what one that was killed has locked is free again.

Snakemake's own lock is a list of files that only its run removes, so that after a `kill -9` the same command is refused until
somebody finds `--unlock`. The kernel's lock on a file ends with the process that has it, however that ends: whoever gets it
knows that no run is at work here, and that Snakemake's locks are of the dead.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from methods.core.job.files import is_locked, try_lock

FILE, SNAKEMAKE_LOCKS = "ptqat.lock", "locks"  # in the folder .snakemake
PATIENCE = 20  # seconds: what only lists or draws jobs holds the lock too, and has ended by then

_held: TextIO | None = None  # open as long as this process lives


def start(folder: Path, unlock: bool) -> None:
    """Take the lock in `folder` for the rest of this process and remove Snakemake's; say who has it if another run does.
    Snakemake's stay where the file system has no locks.

    unlock: whether the user wants Snakemake's locks removed. SystemExit if that would let two runs work at a time.
    """
    folder.mkdir(exist_ok=True)
    if _take(folder):
        if is_locked(folder / FILE):
            shutil.rmtree(folder / SNAKEMAKE_LOCKS, ignore_errors=True)
    elif unlock:
        sys.exit(f"Error: {_owner(folder)} is at work in this folder, so its locks stay.")
    else:
        print(f"{_owner(folder)} is at work in this folder", file=sys.stderr)


def require(folder: Path) -> None:
    """SystemExit if another run still has the lock."""
    end = time.monotonic() + PATIENCE
    while not _take(folder):
        if time.monotonic() > end:
            sys.exit(f"Error: {_owner(folder)} is at work in this folder; wait for it, or stop it.")
        time.sleep(0.5)


def _take(folder: Path) -> bool:
    """Whether this process has the lock by now."""
    global _held
    _held = _held or try_lock(folder / FILE)
    return _held is not None


def _owner(folder: Path) -> str:
    return f"another run ({(folder / FILE).read_text()})"
