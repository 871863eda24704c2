"""How long Snakemake takes to plan the default configuration, against what importing Snakemake or torch alone takes.

python -m tests.bench.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "dry run of the default configuration": ["-m", "snakemake", "-n", "--cores", "8", "reports/summary.md"],
    "snakemake --version": ["-m", "snakemake", "--version"],
    "import torch": ["-c", "import torch"],
    "python -m methods --help": ["-m", "methods", "--help"],
}


def main() -> None:
    for name, arguments in COMMANDS.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        print(f"{name:40} median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}")


if __name__ == "__main__":
    main()
