# Table of contents: the configuration, the rules by stage, the targets. The logic is in workflow/*.py (workflow/README.md).
import glob
import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.io import IOFile

from methods.core.job.files import write_json
from methods.core.job.sources import sources
from workflow import lock, matrix
from workflow.errors import ConfigError


configfile: "workflow/config/default.yaml"


try:
    MATRIX = matrix.load(config)
except ConfigError as error:
    sys.exit(f"Error in the configuration ({', '.join(map(str, workflow.configfiles))}):\n  {error}")

STATE = Path(".snakemake")
TEXTS = Path(f"{MATRIX.results}/text.json")
CHECKED = TEXTS.stat().st_mtime_ns if TEXTS.exists() else None
if workflow.is_main_process and not workflow.output_settings.dryrun:
    lock.start(STATE, unlock="--unlock" in sys.argv)

# Jobs run the Python that Snakemake runs under; a failure on the left of a pipe is a failure. Without glibc's caches of each
# thread a tensor fits where one of its size was (methods/core/job/runtime.py has the rest, but this must be set from outside).
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    "export GLIBC_TUNABLES=${{GLIBC_TUNABLES:+$GLIBC_TUNABLES:}}glibc.malloc.tcache_count=0; "
)


wildcard_constraints:
    package="[^/]+",
    file="[^/]+",
    dataset="[^/]+",
    model="[^/]+",
    scheme="[^/]+",
    method="[^/]+",
    task="[^/]+",
    replicate=r"seed\d+(-tokens\d+)?",


# What downloads runs where Snakemake does, so that a cluster's nodes need no network; the rest of this list takes seconds.
localrules:
    all,
    fetch_package,
    unpack_model,
    unpack_passages,
    prepare_model,
    prepare_text,
    prepare_task,
    check_text,
    allocate,
    matrix,
    report,
    regression,


rule all:
    default_target: True
    input:
        "reports/summary.md",


include: "workflow/rules/common.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


onstart:
    lock.require(STATE)
    print(
        f"{len(MATRIX.cells)} cells. What is done, what runs and how long the rest takes: "
        f"python -m reports.status {MATRIX.results}",
        file=sys.stderr,
    )


# Jobs wait for the check of texts and do not run again for it (`ancient`). Where it runs, Snakemake decides on all that waits
# by that alone, and overlooks what else has changed: an edited method, even a cell that is missing (its issue 4166).
# So another run follows, one at the most: with --forceall the texts would be checked for ever.
onsuccess:
    if CHECKED and TEXTS.stat().st_mtime_ns != CHECKED and "PTQAT_ONCE_MORE" not in os.environ:
        print(
            "The texts in use have changed, and were checked: once more, for what else has changed.",
            file=sys.stderr,
        )
        workflow.persistence.unlock()
        again = [sys.executable, "-m", "snakemake", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | {"PTQAT_ONCE_MORE": "1"})


# A failed cell stays visible: what there is is reported, with the reason for what there is not.
onerror:
    # Not if something else was wanted: the report that is there may be of another configuration. Dated to 1970, and without
    # the record of what it was made from, so that the next run, of whichever configuration, builds the report anew.
    if {"all", "reports/summary.md"} & (set(workflow.dag_settings.targets) or {"all"}):
        shell(
            f"python -m reports.build {MATRIX.results}/matrix.json --allow-missing --output reports/summary.md "
            "&& touch -d @1 reports/summary.md || true"
        )
        workflow.persistence.cleanup_metadata(IOFile("reports/summary.md"))
