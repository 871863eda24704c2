"""The smoke configuration as tests run it (fixtures `checkout` and `smoke` of conftest.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ["--configfile", "workflow/config/smoke.yaml"]
RESULTS = "results/smoke/micro"


def copy_checkout(folder):
    """Copy the tracked files; the fetched packages are shared with this checkout, so they are downloaded once."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(lambda n: (ROOT / n).exists(), listed.stdout.splitlines()):  # not what was deleted just now
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    packages = ROOT / "resources/packages"
    packages.mkdir(parents=True, exist_ok=True)
    (folder / "resources").mkdir()
    (folder / "resources/packages").symlink_to(packages)
    return folder


def snakemake(checkout, *arguments, targets=("reports/summary.md",), **kwargs):
    command = [sys.executable, "-m", "snakemake", "--cores", "8", *CONFIG, *arguments, "--", *targets]
    return subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
