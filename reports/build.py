"""Build the report from result files.

python -m reports.build results/default/matrix.json --output reports/summary.md [--allow-missing]
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from reports import tables
from reports.figures import quality_against_size
from reports.results import read_cells, read_matrix

INTRODUCTION = """\
Each model's rows start from the same full-precision weights and are scored on the same items. ± is a standard error, over
windows of text or over questions; [...] is a 95 % interval of a paired comparison on the same items (bootstrap), so rows can
be told apart that ± alone cannot, and says "tie" where it holds zero. † marks a partial result: a limit left items out.
*KL* is the divergence of the next-token distribution from full precision, in nats per token; *flips* are questions that full
precision answered and the row did not, and the reverse. **Bold**: the best perplexity of a scheme."""


def build(matrix_path: Path, output: Path, allow_missing: bool) -> None:
    """Write the report. ValueError if a cell is missing and `allow_missing` is not set."""
    matrix = read_matrix(matrix_path)
    cells = read_cells(matrix, matrix_path.parent)
    absent = cells[cells["state"] != "done"]
    if len(absent) and not allow_missing:
        names = [f"{c.model}/{c.scheme}/{c.method}/seed{c.seed}: {c.reason}" for c in absent.itertuples()]
        raise ValueError("cells without a result (--allow-missing reports the others):\n  " + "\n  ".join(names))
    parts = [f"# Quantization benchmark: {matrix['name']}", _progress(cells), INTRODUCTION]
    for model, table in cells.groupby("model", sort=False):
        parts.append(f"## {model}")
        if note := matrix["config"]["models"][model].get("note"):
            parts.append(f"> {note}")
        parts += ["### Quality", tables.quality(table)]
        if qat := tables.qat(table):
            parts += ["### QAT against the best PTQ", qat, tables.QAT]
        parts.append(tables.control(table, matrix["config"]))
        if {"perplexity", "bits_per_weight"} <= set(table) and table["perplexity"].notna().sum() > 1:
            figure = output.parent / "figures" / f"{matrix['name']}-{model}.png"
            quality_against_size(table, str(model), figure)
            parts.append(f"![Quality of {model} against bits per weight]({os.path.relpath(figure, output.parent)})")
        if costs := tables.costs(table):
            parts += ["### Size and cost", costs, tables.COST]
        if tasks := tables.tasks(table):
            parts += ["### Tasks", tasks, tables.TASKS]
        if spread := tables.spread(table):
            parts += ["### Spread over seeds", spread]
        parts.append(_protocols(table))
    parts += [_failures(absent), _departures(cells), _provenance(cells, matrix, matrix_path)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, output)
    print(f"wrote {output}", file=sys.stderr)


def _progress(cells: pd.DataFrame) -> str:
    done = int((cells["state"] == "done").sum())
    return "" if done == len(cells) else f"**Partial report: {done} of {len(cells)} cells are done.**"


def _protocols(cells: pd.DataFrame) -> str:
    lines = []
    for column in (c for c in cells if c.endswith("_protocol") and f"{c.removesuffix('_protocol')}_seconds" in cells):
        evaluation = column.removesuffix("_protocol")
        seconds = cells[f"{evaluation}_seconds"].dropna()
        protocols = "`, `".join(cells[column].dropna().unique())
        lines.append(f"- {evaluation}: `{protocols}`; {seconds.mean():.0f} s a checkpoint")
    return "Protocols:\n\n" + "\n".join(lines) if lines else ""


def _failures(absent: pd.DataFrame) -> str:
    if absent.empty:
        return ""
    lines = [f"- {c.model}, {c.scheme}, {c.method}, seed {c.seed}: {c.state}. {c.reason}" for c in absent.itertuples()]
    return "## Cells without a result\n\n" + "\n".join(lines)


def _departures(cells: pd.DataFrame) -> str:
    if "departures" not in cells:
        return ""
    lines = [
        f"- {cell['model']}, {cell['scheme']}, {cell['method']}, seed {cell['seed']}: {departure}"
        for _, cell in cells.iterrows()
        if tables.departed(cell)
        for departure in cell["departures"]
    ]
    return "## Departures from the plan (rows marked *)\n\n" + "\n".join(lines) if lines else ""


def _provenance(cells: pd.DataFrame, matrix: dict[str, Any], path: Path) -> str:
    ran = [p for p in cells.get("provenance", pd.Series(dtype=object)) if isinstance(p, dict)]
    if not ran:
        return ""

    def distinct(*keys: str) -> str:
        return ", ".join(sorted({" ".join(str(p[k]) for k in keys) for p in ran}))

    versions = "; or ".join(sorted({", ".join(f"{k} {v}" for k, v in p["versions"].items()) for p in ran}))
    extra = [name for name in matrix.get("configfiles", []) if not name.endswith("default.yaml")]
    command = " ".join(
        ["snakemake --cores 8", *(["--configfile", *extra, "--"] if extra else []), "reports/summary.md"]
    )
    dtypes = sorted(cells["compute_dtype"].dropna().unique())
    calibration = matrix["config"]["calibration"]
    lines = [
        f"- configuration `{matrix['name']}`, results in `{path.parent}`; built {datetime.date.today()}",
        f"- machine: {distinct('device')}; cores: {distinct('cores')}; computed in {', '.join(dtypes)}",
        f"- code: {distinct('git_commit')}; Python {distinct('python')}; {versions}",
        f"- calibration: {calibration['samples']} sequences of {calibration['sequence_length']} tokens of "
        f"`{calibration['dataset']}`; run between {min(p['date'] for p in ran)} and {max(p['date'] for p in ran)}",
        f"- made by `{command}`",
        "- every cell's `run.json` has its options, hashes, per-layer errors and times",
    ]
    return "## Provenance\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reports.build", description=__doc__.splitlines()[0])
    parser.add_argument("matrix", type=Path, help="matrix.json of a result tree")
    parser.add_argument("--output", type=Path, default=Path("reports/summary.md"))
    parser.add_argument("--allow-missing", action="store_true", help="report what there is")
    args = parser.parse_args()
    try:
        build(args.matrix, args.output, args.allow_missing)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
