"""Faults on the way through the smoke matrix: after each, the same command ends with the same numbers, or names the file.

python -m tests.faults --kills 50 --corruptions 20 --seed 0        (as root, for disks and cgroups; about an hour)

Kills: the matrix runs; at random moments a job, Snakemake, or both are killed, or Snakemake is asked to end. Then the same
command is given again, with neither --unlock nor --rerun-incomplete. At no such moment is there a file that is not whole, and
at the end every number is that of a run without kills, which is made first, to the last digit.

Surroundings: cells of the finished tree are made again on a full disk, on one that may not be written, with too little
memory to allocate, with too little to live (a cgroup, whose jobs the kernel kills), and with a file of tomorrow, as a clock
that was put back leaves it. And while the clock of all processes jumps a day back and two ahead (Debian's libfaketime). The
command says what was the matter, or is killed with its jobs; after that it ends with the same numbers.

Corruptions: in the finished tree a random file is cut short, emptied, exchanged with another or has a byte changed, its time
kept as bit rot keeps it; `reports.verify` must name it, and a report made then has no other number than before. The exit code
is 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from methods.core.job.files import atomic_path
from reports.tree import read_results, tidy
from reports.verify import verify
from tests.smoke import CONFIG, copy_checkout

COMMAND = [sys.executable, "-m", "snakemake", "--cores", "8", "--keep-going", *CONFIG, "--", "reports/summary.md"]
PAUSE = (2.0, 30.0)  # seconds that a run has before the next kill, at least and at most
PROGRAMS = ("methods", "evals", "workflow.prepare")
# Of what a report is made of; those of the first group are in result trees, of the second what they were made from.
CELL = "results/smoke/micro/*/*/*"
CORRUPTIBLE = (
    "results/smoke/matrix.json",
    "results/smoke/text.json",
    "results/smoke/micro/*/allocation.json",
    f"{CELL}/run.json",
    f"{CELL}/checkpoint/model.safetensors",
    f"{CELL}/checkpoint/residuals/*.safetensors",
    f"{CELL}/checkpoint/config.json",
    f"{CELL}/checkpoint/tokenizer.json",
    f"{CELL}/training/metrics.jsonl",
    f"{CELL}/evals/*.json",
    f"{CELL}/evals/*.parquet",
    "resources/models/micro/model.safetensors",
    "resources/models/micro/config.json",
    "resources/models/micro/manifest.json",
    "resources/tokens/micro/*.safetensors",
    "resources/reference/micro/*.safetensors",
    "resources/tasks/**/*.*",
    "resources/text/*/documents.jsonl",
    "resources/text/*/manifest.json",
)


def processes(folder: Path) -> list[int]:
    """The jobs that are at work in a checkout."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            here = Path(os.readlink(entry / "cwd")) == folder
        except OSError:
            continue
        if here and len(words) > 2 and words[1] == b"-m" and words[2].decode().startswith(PROGRAMS):
            found.append(int(entry.name))
    return found


def start(
    folder: Path, log: Path, first: Callable[[], None] | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen:
    """Begin a run. first: what its process does to itself before; env: variables that it has besides those of this one."""
    with open(log, "ab") as out:
        return subprocess.Popen(
            COMMAND,
            cwd=folder,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=first,
            env=os.environ | (env or {}),
        )


def broken(folder: Path) -> list[str]:
    """Files in results and resources that are not whole. (What is being written has a name that begins with a dot.)"""
    found = []
    for path in [p for part in ("results", "resources") for p in (folder / part).rglob("*.*")]:
        if any(name.startswith(".") for name in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt")  # its length is that which its header says
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".parquet":
                pq.read_metadata(path)
        except FileNotFoundError:
            pass  # a job has just replaced it
        except (ValueError, SafetensorError, pa.ArrowInvalid) as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    for checkpoint in folder.glob("results/**/checkpoint"):
        if not (checkpoint / "config.json").is_file():
            found.append(f"{checkpoint.relative_to(folder)}: it is not a whole checkpoint")
    return found


def with_kills(folder: Path, count: int, chance: random.Random) -> tuple[Counter, list[str]]:
    """Run the matrix, with so many kills; how many there were of each kind, and the files that were not whole then. Some
    cells are made again as often as the matrix is complete before.

    RuntimeError with the end of the log if it does not end well once there are no more kills.
    """
    log, done, torn = folder / "faults.log", Counter(), []
    process = start(folder, log)
    bar = tqdm(total=count, desc="kills", file=sys.stderr)
    while done.total() < count:
        time.sleep(chance.uniform(*PAUSE))
        if process.poll() is not None:
            if process.returncode == 0:
                forget(folder)
            process = start(folder, log)
            continue
        kind = chance.choice(("job", "snakemake", "all", "terminated"))
        if kind == "job":
            if not (jobs := processes(folder)):
                continue
            os.kill(chance.choice(jobs), signal.SIGKILL)
        elif kind == "snakemake":
            process.kill()
        elif kind == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
        if kind != "job":
            process.wait()
            process = start(folder, log)
        done[kind] += 1
        torn += broken(folder)
        bar.update()
    bar.close()
    while (code := process.wait()) and done["again"] < 3:  # a job that was killed has failed the run
        process = start(folder, log)
        done["again"] += 1
    if code:
        raise RuntimeError(log.read_text(errors="replace")[-3000:])
    return done, torn


KEY = ["model", "scheme", "method", "seed", "budget", "metric"]
OF_THE_MACHINE = "seconds|memory|minutes"  # in the names of metrics


def differences(folder: Path, reference: Path) -> list[str]:
    """Numbers of a report that are not those of another, to the last digit."""
    here, there = (pd.read_parquet(each / "reports/summary/results.parquet") for each in (folder, reference))
    here, there = numbers(here), numbers(there)
    absent = [f"{index}: it is not there" for index in there.index.difference(here.index)]
    return absent + unequal(here, there)


def reported(tree: Path) -> pd.Series:
    """The numbers that a report of a result tree has, as it is now. ValueError if there can be none."""
    return numbers(tidy(read_results(tree / "matrix.json")))


def numbers(table: pd.DataFrame) -> pd.Series:
    """Every value, and its change from full precision with the interval, by cell, metric and which of these it is."""
    return (
        table.dropna(subset="metric").set_index(KEY)[["value", "change", "change_low", "change_high"]].stack().dropna()
    )


def unequal(here: pd.Series, there: pd.Series) -> list[str]:
    """Numbers that are others in `there`, or not in it."""
    both = pd.concat([here, there.reindex(here.index)], axis=1, keys=("here", "there"))
    both = both[~both.index.get_level_values("metric").str.contains(OF_THE_MACHINE)]
    return [f"{i}: {row.here} instead of {row.there}" for i, row in both[both.here != both.there].iterrows()]


Changed = dict[str, Any]  # arguments of `start`
CELLS = "results/smoke/micro/w3-g64/gptq"  # what is made again in other surroundings
ADDRESSES = 2 * 2**30  # bytes: enough for Snakemake, too little for a job
RESIDENT = 450 * 2**20  # likewise; a job that has imported torch and loaded the model has more
CGROUPS = Path("/sys/fs/cgroup")
# Debian's place of it. Without the last, waits that end at a time would never end.
FAKETIME = {
    "LD_PRELOAD": f"/usr/lib/{os.uname().machine}-linux-gnu/faketime/libfaketime.so.1",
    "FAKETIME_NO_CACHE": "1",
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
}
JUMPS = {5: "-1d", 15: "+1d", 25: "+0"}  # of the clock, after so many seconds


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A disk in memory in the place of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def few_addresses() -> Iterator[Changed]:
    """So little memory for the processes of a run that allocations fail."""
    yield {"first": lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES,) * 2)}


@contextmanager
def small_cgroup() -> Iterator[Changed]:
    """A cgroup, of either version, for the processes of a run, with so little memory that the kernel kills some or all."""
    old = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if old else CGROUPS) / f"ptqat-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(RESIDENT))
        yield {"first": lambda: (group / "cgroup.procs").write_text(str(os.getpid()))}
    finally:
        # A process that was killed is in its group until it has gone.
        end = time.monotonic() + 30
        while (group / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.1)
        group.rmdir()


@contextmanager
def file_of_tomorrow(path: Path) -> Iterator[None]:
    """The clock has been put back since a file was written."""
    times = path.stat()
    os.utime(path, (time.time() + 86400,) * 2)
    try:
        yield
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextmanager
def jumps() -> Iterator[Changed]:
    """A clock of the processes of a run that jumps."""
    with tempfile.TemporaryDirectory() as temporary:
        offset, over = Path(temporary) / "offset", threading.Event()
        offset.write_text("+0")

        def jump() -> None:
            started = time.monotonic()
            for seconds, value in JUMPS.items():
                over.wait(started + seconds - time.monotonic())
                with atomic_path(offset) as new:
                    new.write_text(value)

        thread = threading.Thread(target=jump)
        thread.start()
        yield {"env": FAKETIME | {"FAKETIME_TIMESTAMP_FILE": str(offset)}}
        over.set()
        thread.join()


def forget(folder: Path) -> None:
    """Remove cells of a finished tree, and the report, else Snakemake does not miss what it was made of."""
    shutil.rmtree(folder / CELLS)
    (folder / "reports/summary.md").unlink(missing_ok=True)


def with_surroundings(folder: Path, reference: Path) -> list[str]:
    """Make cells again where that cannot go well, and then where it can; what was wrong with this.

    What the first run says must have the words that belong to its surroundings.
    """
    cells = folder / CELLS
    faults: dict[str, tuple[Callable, str]] = {
        "full disk": (lambda: disk(cells, "size=64k"), "No space left on device"),
        "read-only disk": (lambda: disk(cells, "ro"), "Read-only file system"),
        "few addresses": (few_addresses, "emory"),
        "small cgroup": (small_cgroup, "Killed"),
        "file of tomorrow": (lambda: file_of_tomorrow(folder / "results/smoke/text.json"), "older modification time"),
        "jumps of the clock": (jumps, "older modification time"),
    }
    wrong, log = [], folder / "surroundings.log"
    for name, (surroundings, words) in tqdm(faults.items(), desc="surroundings", file=sys.stderr):
        forget(folder)
        log.unlink(missing_ok=True)
        with surroundings() as changed:
            code = start(folder, log, **(changed or {})).wait()
        said = "".join(
            p.read_text(errors="replace") for p in [log, *folder.glob("logs/smoke/micro/w3-g64/gptq/**/*.log")]
        )
        # A clock that jumps between two jobs does no harm.
        well = surroundings is jumps if code == 0 else words in said or code == -signal.SIGKILL
        if not well:
            wrong.append(f"{name}: exit code {code}, and it does not say {words!r}: {said[-2000:]}")
        if code := start(folder, log).wait():
            wrong.append(f"after {name}: exit code {code}: {log.read_text(errors='replace')[-2000:]}")
        wrong += [f"after {name}: {each}" for each in [*broken(folder), *differences(folder, reference)]]
    return wrong


def corrupt(path: Path, others: list[Path], chance: random.Random) -> str:
    """Damage a file in a random way and keep its time; what was done."""
    times, data = path.stat(), bytearray(path.read_bytes())
    twin = next((p for p in others if p != path and p.name == path.name and p.read_bytes() != data), None)
    kind = chance.choice(("a byte", "cut short", "emptied", *(["exchanged"] if twin else [])))
    if kind == "a byte":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut short":
        data = data[: chance.randrange(1, len(data))]
    elif kind == "emptied":
        data = bytearray()
    else:
        data = twin.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return kind


def with_corruptions(folder: Path, count: int, chance: random.Random) -> tuple[Counter, list[str]]:
    """Damage so many files, one at a time. How many of each kind were named by `reports.verify` and changed no number of
    the report; and those that were not, or did."""
    tree, found, missed = folder / "results/smoke", Counter(), []
    before = reported(tree)
    for _ in tqdm(range(count), desc="corruptions", file=sys.stderr):
        files = sorted(folder.glob(chance.choice(CORRUPTIBLE)))
        path = chance.choice(files)
        times, data = path.stat(), path.read_bytes()
        kind = corrupt(path, files, chance)
        try:
            v = verify(tree)
            said = "\n".join([*v.deviations, *v.missing])
        except ValueError as error:
            said = str(error)
        try:
            wrong = unequal(reported(tree), before)
        except ValueError as error:  # the report stops, and says of what file
            wrong = [] if str(path) in str(error) else [f"the report says {error}"]
        # The hash of a folder's files is named with the folder.
        if not any(re.search(re.escape(str(place)) + r"(?![\w./-])", said) for place in (path, path.parent)):
            wrong.append("verify does not name it")
        if wrong:
            missed.append(f"{path.relative_to(folder)}, {kind}: {'; '.join(wrong)}")
        else:
            found[kind] += 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return found, missed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help="a checkout with a finished smoke run of this code and machine")
    args = parser.parse_args()
    if os.geteuid():
        parser.error("mounting disks needs root")
    if not Path(FAKETIME["LD_PRELOAD"]).is_file():
        parser.error(f"there is no {FAKETIME['LD_PRELOAD']}: apt-get install libfaketime")
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_checkout(Path(temporary).resolve() / "faults")
        reference = args.reference
        if reference is None:
            reference = copy_checkout(Path(temporary).resolve() / "reference")
            subprocess.run(COMMAND, cwd=reference, check=True)
        # The same model: training it is not part of what is tested, and takes longest. It must be newer than its text.
        for name in ("text", "models"):
            shutil.copytree(reference / "resources" / name, folder / "resources" / name)
        started = time.monotonic()
        kills, wrong = with_kills(folder, args.kills, chance)
        if kills.total() < args.kills:
            wrong.append(f"the matrix ended after {kills.total()} kills")
        minutes = (time.monotonic() - started) / 60
        wrong += differences(folder, reference)
        wrong += with_surroundings(folder, reference)
        wrong += [f"verify: {each}" for v in [verify(folder / "results/smoke")] for each in (*v.missing, *v.deviations)]
        found, missed = with_corruptions(folder, args.corruptions, chance)
    print(f"{minutes:.0f} minutes with kills: {dict(kills)}; then six surroundings; {len(wrong)} things were wrong")
    print(f"corruptions named: {dict(found)}; {len(missed)} not named")
    print("\n".join([*wrong, *missed]))
    sys.exit(bool(wrong or missed))


if __name__ == "__main__":
    main()
