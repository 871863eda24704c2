"""Files that are either complete or absent, their hashes, the remains of interrupted jobs, a log's first line. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[3]  # of the repository
# In a checkpoint: what its method had before it rounded, for a training that starts from it. In a folder of its own, so that
# nobody takes it for weights. It may be deleted; a training then starts from the codes, and its run.json says so.
RESIDUALS = "residuals/residuals.safetensors"
CHECKPOINT_FILES = ("config.json", "tokenizer.json", "*.safetensors*")  # what it computes with
SEAL = "seal"  # key of a JSON object's own hash


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder; renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # a killed job's
    try:
        yield temporary
        if temporary.is_dir():
            _remove(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def try_lock(path: Path) -> TextIO | None:
    """The lock on a file, which says which process has it; None if another process has it.

    It is held until what is returned is closed or the process ends, however it ends: the kernel sees to that. A file system
    without locks gives it to everyone (`is_locked` tells).
    """
    file = open(path, "a+")  # noqa: SIM115 (open as long as the lock is held)
    if _is_taken(file):
        file.close()
        return None
    file.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
    return file


def is_locked(path: Path) -> bool:
    """Whether some process, this one included, has the lock on a file."""
    with open(path, "a") as file:
        return _is_taken(file)


def _is_taken(file: TextIO) -> bool:
    """Lock an open file, until it is closed; whether another has it locked. Nobody has where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Be the only process that makes `output`, a file or a folder, of those that ask for it; wait for one that is at it.

    A job outlives a Snakemake that was killed. The job that the next run starts in its place must not write beside it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.parent / f".{output.name}.lock"
    held = try_lock(lock)
    if held is None:
        print(f"waiting for {lock.read_text()}, which makes {output}; or kill it", file=sys.stderr, flush=True)
    while held is None:
        time.sleep(0.5)
        held = try_lock(lock)
    with held:
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value; an object with a hash of its contents under `SEAL`, by which `read_json` finds damage to the file.

    ValueError for an object that has this key.
    """
    if isinstance(value, dict):
        value = json.loads(json.dumps(value))  # as it will be read: keys are strings
        if SEAL in value:
            raise ValueError(f"{path} cannot have a key {SEAL!r} of its own")
        value[SEAL] = _seal(value)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, sealed: bool = False) -> Any:
    """The JSON in `path`, less its seal. sealed: whether there must be one; files of other programs have none.

    ValueError naming the file if it is not JSON, or not what was written.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if sealed and seal is None:
        raise ValueError(f"{path} has no {SEAL!r}: it was made by an older version, or changed")
    if seal is not None and seal != _seal(value):
        raise ValueError(f"{path} has been changed or damaged since it was written: its {SEAL!r} is of other contents")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def earlier_json(path: Path) -> dict[str, Any]:
    """The object that an earlier job left in `path`; an empty one if there is none, or if it was cut off or damaged."""
    try:
        value = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: str | Path, patterns: tuple[str, ...]) -> str:
    """Hash of the names and contents of the files in `folder` that match one of `patterns`."""
    paths = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    return sha256_files((path.name, sha256_file(path)) for path in paths)


def sha256_files(files: Iterable[tuple[str, str]]) -> str:
    """Hash of the names and hashes of files."""
    digest = hashlib.sha256()
    for name, sha256 in files:
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def checkpoint_sha256(folder: str | Path) -> str:
    """Hash of what a checkpoint computes with; the same numbers give the same hash on any machine."""
    return sha256_folder(folder, CHECKPOINT_FILES)


def model_hashes(folder: Path) -> dict[str, str]:
    """What the manifest of a prepared model says of its files: those that it computes with."""
    hashes = {"sha256": sha256_folder(folder, ("*.safetensors",))}
    names = {"config_sha256": "config.json", "tokenizer_sha256": "tokenizer.json"}
    return hashes | {key: sha256_file(folder / name) for key, name in names.items() if (folder / name).is_file()}


def check_model(folder: Path) -> None:
    """ValueError if a prepared model is not as its manifest says, or a cell's checkpoint as its run.json says."""
    manifest, run = folder / "manifest.json", folder.parent / "run.json"
    if manifest.is_file():
        recorded, now = read_json(manifest), model_hashes(folder)
        same = {key: recorded.get(key, value) for key, value in now.items()} == now  # an older one has fewer
        where = manifest
    elif run.is_file():
        same, where = read_json(run, sealed=True).get("checkpoint_sha256") == checkpoint_sha256(folder), run
    else:
        return
    if not same:
        raise ValueError(f"{folder} has been changed or damaged: its hash is not that in {where}")


def keep_or_clear(folder: Path, settings: dict[str, Any]) -> None:
    """Remove what an interrupted job left in its folder, unless it had the same settings; note those of this one."""
    settings, file = json.loads(json.dumps(settings)), folder / "settings.json"
    if folder.is_dir() and earlier_json(file) != settings:
        shutil.rmtree(folder)
    write_json(file, settings)


def residuals_sha256(checkpoint: Path) -> str | None:
    """Hash of what the method of a checkpoint had before it rounded; None where that is not there."""
    path = checkpoint / RESIDUALS
    return sha256_file(path) if path.is_file() else None


def announce() -> None:
    """The first line of a job's log, from which `reports.status` knows since when it runs."""
    print(f"started {datetime.now().astimezone().isoformat(timespec='seconds')}", file=sys.stderr, flush=True)
