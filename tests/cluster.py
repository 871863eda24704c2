"""A real Slurm of one node on this machine, and the smoke matrix through it.

python -m tests.cluster shell          a shell in which sbatch, squeue and the profile workflow/profiles/slurm work
python -m tests.cluster smoke          the whole smoke matrix through the profile, with its kills (16 to 25 minutes)

Needs Debian's slurm-wlm and munge, and root, since slurmd starts jobs as their owner. Everything is removed at the end; a
machine with a Slurm of its own is refused. There is no accounting database, so jobs are watched by squeue.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from methods.core.job.cores import available_cores
from tests.smoke import copy_checkout

# Not in an environment variable: the executor takes all of Slurm's out of a job's environment.
CONFIG_FILE = Path("/etc/slurm/slurm.conf")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=ptqat
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
MailProg=/bin/true
MinJobAge=86400
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory_mb}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
START_SECONDS = 30


def missing() -> str | None:
    """Why Slurm cannot run here; None if it can."""
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    if CONFIG_FILE.exists():
        return f"there is a Slurm already: {CONFIG_FILE}"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextmanager
def slurm() -> Iterator[None]:
    """Until the end of the `with` block this machine is a Slurm cluster of one node. RuntimeError if it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="ptqat-slurm-"))
    processes = []
    try:
        folder.chmod(0o755)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        text = CONFIG.format(
            folder=folder,
            host=os.uname().nodename,
            ports=_free_ports(2),
            cores=available_cores(),
            memory_mb=int(0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20),
        )
        CONFIG_FILE.write_text(text)
        munge = ["munged", "--foreground", *(f"--{name}={folder}/{file}" for name, file in MUNGE.items())]
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.out", "w") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=out))
        _wait(folder)
        yield
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()
        CONFIG_FILE.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


MUNGE = {
    "key-file": "key",
    "socket": "munge.socket",
    "log-file": "munged.log",
    "pid-file": "munged.pid",
    "seed-file": "munge.seed",
}


def _wait(folder: Path) -> None:
    """Until the node takes jobs. RuntimeError with the logs if it does not."""
    for _ in range(START_SECONDS):
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
        if state.stdout.strip() == "idle":
            return
        time.sleep(1)
    logs = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"Slurm has not started within {START_SECONDS} s\n{logs}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


# Files are there at once and jobs take seconds, unlike on a cluster.
QUICK = ("--latency-wait", "5", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3")
QUICK += ("--seconds-between-status-checks", "3", "--slurm-keep-successful-logs")
# One core each, so that sums have the order that they have in the local run; the micro model is trained with two there, too.
THREADS = ("train_model=2", *(f"{rule}=1" for rule in ("generate", "reference", "sensitivity", "quantize", "evaluate")))
# A process that has imported torch needs more than the first attempt of a step is given.
TOO_LITTLE = "quantize:mem_mb=200 if attempt < 2 else 2000"


def command(*arguments: str, targets: Iterable[str]) -> list[str]:
    """What runs the smoke configuration through the profile."""
    profile = ["--profile", "workflow/profiles/slurm", *QUICK, "--configfile", "workflow/config/smoke.yaml"]
    return [sys.executable, "-m", "snakemake", *profile, "--set-threads", *THREADS, *arguments, "--", *targets]


def exercise(checkout: Path, targets: Iterable[str], patience: float) -> dict[str, int]:
    """Make the targets through Slurm, with faults on the way; how many jobs ended in which state.

    The first attempts of all steps get too little memory. A job that runs is cancelled. Once one has finished and another
    runs, Snakemake is killed, and the same command is given again. patience: seconds that each of these may take.
    RuntimeError with the end of Snakemake's log if something else fails.
    """
    log = checkout / "slurm.log"
    run = command("--set-resources", TOO_LITTLE, targets=targets)

    def start() -> subprocess.Popen:
        with open(log, "ab") as out:
            return subprocess.Popen(run, cwd=checkout, stdout=out, stderr=out, start_new_session=True)

    process = start()
    try:
        until(lambda: jobs("RUNNING"), process, patience, log)
        subprocess.run(["scancel", *jobs("RUNNING")], check=True)
        until(lambda: jobs("COMPLETED") and jobs("RUNNING"), process, patience, log)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Slurm goes on with what it has; two runs of one job must not meet, so the user cancels them.
        subprocess.run(["scancel", *jobs("PENDING"), *jobs("RUNNING")], check=True)
        process = start()
        if process.wait(timeout=patience):
            raise RuntimeError(log.read_text(errors="replace")[-3000:])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Counter(states().values())


def until(holds: Callable[[], Any], process: subprocess.Popen, patience: float, log: Path) -> None:
    """Wait for it. RuntimeError with the log if the process ends before, or after so many seconds."""
    end = time.monotonic() + patience
    while not holds():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(log.read_text(errors="replace")[-3000:])
        time.sleep(0.5)


def states() -> dict[str, str]:
    """State of every job of this Slurm by its id."""
    listed = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%i %T"], capture_output=True, text=True, check=True)
    return dict(line.split() for line in listed.stdout.splitlines())


def jobs(state: str) -> list[str]:
    return [job for job, its in states().items() if its == state]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("shell", "smoke"))
    what = parser.parse_args().what
    if reason := missing():
        sys.exit(f"error: {reason}")
    with slurm():
        if what == "shell":
            subprocess.run([os.environ.get("SHELL", "bash")])
            return
        with tempfile.TemporaryDirectory() as folder:
            checkout = copy_checkout(Path(folder))
            started = time.monotonic()
            ended = exercise(checkout, ["reports/summary.md", "regression"], patience=3600)
            minutes = (time.monotonic() - started) / 60
            print(f"{sum(ended.values())} jobs in {minutes:.0f} minutes: {dict(ended)}")
            print((checkout / "reports/regression.md").read_text())


if __name__ == "__main__":
    main()
