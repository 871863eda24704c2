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

from reports.figures import quality_against_size
from reports.results import REFERENCE, read_cells, read_matrix

INTRODUCTION = """\
Each model's rows start from the same full-precision weights and are scored on the same text. *Perplexity*: lower is
better; ± is its standard error over windows. *Against full precision*: relative change with its 95 % interval, paired
window by window, so rows can be told apart that ± alone cannot. *Bits/weight*: codes, scales and zero points of the
quantized layers as stored; embeddings, norms and head are not quantized. *Size*: the checkpoint's weights on disk, all
included. *Trained*: share of the model's parameters; *moved*: share of these that changed at all; *codes changed*: share
of the integers that are not those of the first step. *Time*: of quantizing, with that of the method it starts from and of
generating its training text. *Peak memory*: of the process until then, its libraries (about 400 MB) and the loaded model
included. **Bold**: the best of a scheme."""


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
        parts += [_table(table), _control(table, matrix["config"])]
        if {"perplexity", "bits_per_weight"} <= set(table) and table["perplexity"].notna().sum() > 1:
            figure = output.parent / "figures" / f"{matrix['name']}-{model}.png"
            quality_against_size(table, str(model), figure)
            parts.append(f"![Perplexity of {model} against bits per weight]({os.path.relpath(figure, output.parent)})")
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


def _table(cells: pd.DataFrame) -> str:
    best = set()
    if "perplexity" in cells:
        for _, group in cells.groupby(["scheme", "perplexity_protocol"]):
            if group["perplexity"].notna().sum() > 1:
                best.add(group["perplexity"].idxmin())
    trained = "training_tokens" in cells and cells["training_tokens"].notna().any()
    on_device = "device_memory_mb" in cells and cells["device_memory_mb"].notna().any()
    rows = []
    for index, cell in cells.iterrows():
        start = f" (from {cell['init_from']})" if isinstance(cell.get("init_from"), str) and cell["init_from"] else ""
        row = {"scheme": cell["scheme"], "method": cell["method"] + start + (" *" if _departed(cell) else "")}
        if cells["seed"].nunique() > 1:
            row["seed"] = cell["seed"]
        if cell["state"] != "done" and pd.isna(cell.get("perplexity")):
            rows.append(row | {"perplexity": cell["state"]})
            continue
        bold = "**" if index in best else ""
        rows.append(
            row
            | {
                "perplexity": f"{bold}{_number(cell['perplexity'])}{bold} ± {_number(cell['perplexity_stderr'])}",
                "against full precision": _change(cell),
                "bits/weight": f"{cell['bits_per_weight']:.2f}",
                "size MB": f"{cell['size_mb']:.1f}",
                **(_training(cell) if trained else {}),
                "time s": f"{cell['seconds']:.0f}",
                "peak memory MB": f"{cell['host_memory_mb']:.0f}",
                **({"GPU memory MB": f"{cell['device_memory_mb']:.0f}"} if on_device else {}),
            }
        )
    table = pd.DataFrame(rows).fillna("")
    align = ["left", "left"] + ["right"] * (len(table.columns) - 2)
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def _training(cell: pd.Series) -> dict[str, str]:
    """What a cell was trained on, and how much of the model was trained."""
    if pd.isna(cell["training_tokens"]):
        return {"training tokens": "", "trained": "", "moved": "", "codes changed": ""}
    return {
        "training tokens": f"{cell['training_tokens']:,.0f} {cell['trained_on']}",
        "trained": f"{100 * cell['trained_share']:.1f} %",
        "moved": f"{100 * cell['moved']:.0f} %",
        "codes changed": "" if pd.isna(cell["codes_changed"]) else f"{100 * cell['codes_changed']:.1f} %",
    }


def _control(cells: pd.DataFrame, config: dict[str, Any]) -> str:
    """What training alone did, in words: the part of a QAT row's number that is not QAT's."""
    if "training_tokens" not in cells or "change" not in cells:
        return ""
    controls = cells[(cells["scheme"].map(lambda s: not config["schemes"][s])) & cells["training_tokens"].notna()]
    lines = [
        f"Training control: full precision trained on the same tokens of `{c.trained_on}` (`{c.method}`, seed {c.seed}) "
        f"changes perplexity by {_change(pd.Series(c._asdict()))}. So much comes from that text and next-token loss alone; "
        "the merit of a QAT method trained in that way is what lies beyond it."
        for c in controls.itertuples()
        if pd.notna(c.change)
    ]
    return "\n\n".join(lines)


def _departed(cell: pd.Series) -> bool:
    return isinstance(cell.get("departures"), list) and bool(cell["departures"])


def _number(value: float) -> str:
    """Four significant digits, never in powers of ten below a million."""
    if pd.isna(value):
        return "-"
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _change(cell: pd.Series) -> str:
    if cell["method"] == REFERENCE:
        return "reference"
    if pd.isna(cell.get("change")):
        return "-"
    low, mid, high = (100 * cell[name] for name in ("change_low", "change", "change_high"))
    if abs(mid) >= 1000:
        return f"{mid / 100 + 1:,.0f} x"
    digits = 1 if abs(mid) < 100 else 0
    return f"{mid:+.{digits}f} % [{low:+.{digits}f}, {high:+.{digits}f}]"


def _protocols(cells: pd.DataFrame) -> str:
    columns = [c for c in cells if c.endswith("_protocol")]
    lines = []
    for column in columns:
        protocols = cells[column].dropna().unique()
        partial = " (partial: a limit left text out)" if cells[column.replace("_protocol", "_partial")].any() else ""
        lines.append(f"{column.removesuffix('_protocol').capitalize()} protocol: `{'`, `'.join(protocols)}`{partial}.")
    return " ".join(lines)


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
        if _departed(cell)
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
