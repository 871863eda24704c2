"""The report's tables: cells of one model as Markdown."""

from __future__ import annotations

from typing import Any

import pandas as pd

from evals.core.statistics import Interval, seed_spread
from reports.results import REFERENCE

LOWER_IS_BETTER = ("perplexity", "kl_mean", "kl_p99")
# Columns of the first table: metric, name, and how a value is written.
HEADLINES = (
    ("perplexity", "perplexity", "number"),
    ("zero_shot_avg8", "zero-shot avg8 %", "share"),
    ("zero_shot_avg6", "zero-shot avg6 %", "share"),
    ("mmlu_0shot", "MMLU 0-shot %", "share"),
    ("mmlu_5shot", "MMLU 5-shot %", "share"),
    ("kl_mean", "KL", "number"),
    ("kl_p99", "KL p99", "number"),
    ("top1_agreement", "top-1 agreement %", "share"),
)

QAT = """\
Change from the best method of the scheme that does not train (by perplexity) on the same items, in percent for perplexity and
in points of percent for accuracies, with its 95 % interval. *Extra time*: of quantizing, beyond that method's."""

COST = """\
*Bits/weight*: codes, scales and zero points of the quantized layers as stored; embeddings, norms and head are not quantized.
*Size*: the checkpoint's weights on disk, all included. *KV cache*: per token. *Trained*: share of the model's parameters;
*moved*: share of these that changed at all; *codes changed*: share of the integers that are not those of the first step.
*Time*: of quantizing, with that of the method it starts from and of generating its training text. *Peak memory*: of the
process until then, its libraries (about 400 MB) and the loaded model included."""

TASKS = """\
Share of right answers in percent, in brackets the questions that full precision answered and this row did not, and the
reverse; `!` where so uneven a change has a probability below 5 % by chance (McNemar's exact test, not corrected for the
number of tasks)."""


def _name(cell: pd.Series, cells: pd.DataFrame) -> dict[str, Any]:
    """The columns that say which cell a row is."""
    start = f" (from {cell['init_from']})" if isinstance(cell.get("init_from"), str) and cell["init_from"] else ""
    row = {"scheme": cell["scheme"], "method": cell["method"] + start + (" *" if departed(cell) else "")}
    return row | ({"seed": cell["seed"]} if cells["seed"].nunique() > 1 else {})


def _markdown(rows: list[dict[str, Any]]) -> str:
    table = pd.DataFrame(rows).fillna("")
    align = ["left", "left"] + ["right"] * (len(table.columns) - 2)
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def quality(cells: pd.DataFrame) -> str:
    """Every headline metric of every cell, and how it compares with full precision."""
    best = set()
    if "perplexity" in cells:
        for _, group in cells.groupby(["scheme", "perplexity_protocol"]):
            if group["perplexity"].notna().sum() > 1:
                best.add(group["perplexity"].idxmin())
    rows = []
    for index, cell in cells.iterrows():
        row = _name(cell, cells)
        for metric, name, kind in HEADLINES:
            if metric not in cells:
                continue
            text = _estimate(cell[metric], cell[f"{metric}_stderr"], kind)
            if pd.isna(cell[metric]) and cell["state"] != "done":
                text = cell["state"]
            row[name + _dagger(cells, metric)] = f"**{text}**" if metric == "perplexity" and index in best else text
            if f"{metric}_against_reference" in cells and metric != "kl_mean":
                change = f"change of {name.rstrip('% ')}" + _dagger(cells, metric)
                row[change] = _against(cell, metric, "reference")
        if "flips" in cells:
            row["zero-shot flips: lost, won" + _dagger(cells, "zero_shot")] = _flips(cell)
        rows.append(row)
    return _markdown(rows)


def qat(cells: pd.DataFrame) -> str:
    """Each cell that was trained against the best of its scheme that was not, item by item."""
    columns = [(m, name) for m, name, _ in HEADLINES if f"{m}_against_ptq" in cells]
    rows = []
    for _, cell in cells[cells["rival"] != ""].iterrows():
        row = _name(cell, cells) | {"best PTQ": cell["rival"]}
        row |= {name.rstrip("% ") + _dagger(cells, m): _against(cell, m, "ptq") for m, name in columns}
        rows.append(row | {"its extra time s": f"{cell['extra_seconds']:+.0f}"})
    return _markdown(rows) if rows else ""


def costs(cells: pd.DataFrame) -> str:
    done = cells[cells["seconds"].notna()] if "seconds" in cells else cells[:0]
    trained = len(done) and done["training_tokens"].notna().any()
    on_device = len(done) and done["device_memory_mb"].notna().any()
    sizes = (
        ("bits_per_weight", "bits/weight", "{:.2f}"),
        ("size_mb", "size MB", "{:.1f}"),
        ("kv_cache_bytes", "KV cache bytes", "{:,.0f}"),
    )
    rows = []
    for _, cell in done.iterrows():
        row = _name(cell, cells)
        row |= {name: "" if pd.isna(cell[m]) else form.format(cell[m]) for m, name, form in sizes if m in done}
        row |= _training(cell) if trained else {}
        row |= {"time s": f"{cell['seconds']:.0f}", "peak memory MB": f"{cell['host_memory_mb']:.0f}"}
        row |= {"GPU memory MB": f"{cell['device_memory_mb']:.0f}"} if on_device else {}
        rows.append(row)
    return _markdown(rows) if rows else ""


def tasks(cells: pd.DataFrame) -> str:
    """The score of every task, and how answers flipped."""
    scores = {task: metric for found in cells["scores"] for task, metric in found.items()}
    rows = []
    for _, cell in cells[cells[[*scores.values()]].notna().any(axis=1)].iterrows() if scores else ():
        row = _name(cell, cells)
        for task, metric in scores.items():
            flip = cell["flips"].get(task) if isinstance(cell.get("flips"), dict) else None
            changed = f" ({flip.worse}, {flip.better}){'!' if flip.p < 0.05 else ''}" if flip else ""
            row[task + _dagger(cells, metric)] = _estimate(cell[metric], cell[f"{metric}_stderr"], "share") + changed
        rows.append(row)
    return _markdown(rows) if rows else ""


def spread(cells: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds, where there are several."""
    rows = []
    for (scheme, method), group in cells.groupby(["scheme", "method"], sort=False):
        if group["seed"].nunique() < 2:
            continue
        row = {"scheme": scheme, "method": method, "seeds": group["seed"].nunique()}
        for metric, name, kind in HEADLINES:
            if metric in group and group[metric].notna().sum() > 1:
                row[name + _dagger(cells, metric)] = _estimate(*seed_spread(group[metric].dropna().to_numpy()), kind)
        rows.append(row)
    return _markdown(rows) + "\n\n± here is the standard deviation over seeds." if rows else ""


def _estimate(value: float, error: float | None, kind: str) -> str:
    """A value with its standard error, in percent for a share."""
    if pd.isna(value):
        return "-"
    if kind == "share":
        return f"{100 * value:.1f}" + ("" if error is None or pd.isna(error) else f" ± {100 * error:.1f}")
    return _number(value) + ("" if error is None or pd.isna(error) else f" ± {_number(error)}")


def _dagger(cells: pd.DataFrame, metric: str) -> str:
    """The mark of a column with partial results."""
    column = f"{metric}_partial"
    return " †" if column in cells and cells[column].eq(True).any() else ""


def _against(cell: pd.Series, metric: str, rival: str) -> str:
    """A paired comparison: the change, its interval and the verdict."""
    if rival == "reference" and cell["method"] == REFERENCE:
        return "reference"
    interval = cell.get(f"{metric}_against_{rival}")
    if not isinstance(interval, Interval):
        return ""
    verdict = interval.verdict(higher_is_better=metric not in LOWER_IS_BETTER)
    if metric == "kl_mean":
        return f"{interval.value:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}] {verdict}"
    if metric == "perplexity" and abs(interval.value) >= 10:
        return f"{interval.value + 1:,.0f} x, {verdict}"
    digits = 0 if metric == "perplexity" and abs(interval.value) >= 1 else 1
    low, mid, high = (100 * v for v in (interval.low, interval.value, interval.high))
    unit = " %" if metric == "perplexity" else ""
    return f"{mid:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}] {verdict}"


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


def _flips(cell: pd.Series) -> str:
    """Zero-shot questions that full precision answered and this cell did not, and the reverse."""
    if not isinstance(cell.get("flips"), dict):
        return ""
    found = [f for task, f in cell["flips"].items() if not task.startswith("mmlu")]
    return f"{sum(f.worse for f in found)}, {sum(f.better for f in found)} of {sum(f.n for f in found)}"


def control(cells: pd.DataFrame, config: dict[str, Any]) -> str:
    """What training alone did, in words: the part of a QAT row's number that is not QAT's."""
    if "training_tokens" not in cells or "perplexity_against_reference" not in cells:
        return ""
    controls = cells[(cells["scheme"].map(lambda s: not config["schemes"][s])) & cells["training_tokens"].notna()]
    lines = [
        f"Training control: full precision trained on the same tokens of `{cell['trained_on']}` (`{cell['method']}`, seed "
        f"{cell['seed']}) changes perplexity{_dagger(cells, 'perplexity')} by {_against(cell, 'perplexity', 'reference')}. "
        "So much comes from that text and next-token loss alone; the merit of a QAT method trained in that way is what lies "
        "beyond it."
        for _, cell in controls.iterrows()
        if isinstance(cell["perplexity_against_reference"], Interval)
    ]
    return "\n\n".join(lines)


def departed(cell: pd.Series) -> bool:
    return isinstance(cell.get("departures"), list) and bool(cell["departures"])


def _number(value: float) -> str:
    """Four significant digits, never in powers of ten below a million."""
    if pd.isna(value):
        return "-"
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
