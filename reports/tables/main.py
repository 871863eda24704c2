"""Every cell: quality, size and cost in one line."""

from __future__ import annotations

from reports.cells import Cell
from reports.document import ALL_METHODS, Entry, Place, Table
from reports.metrics import headlines, is_part
from reports.statistics import Flips
from reports.tables._entries import dagger, estimate, name_columns, number, partial_metrics, scaled, table_of, word
from reports.tree import Results

PLACE = Place(ALL_METHODS)
NOTE = """\
**Bold**: the best of a scheme (and seed) by that measure; ≈: not told apart from the best (95 % interval of the paired
difference). *KL*: divergence of the next-token distribution from full precision, nats per token. *Flips*: zero-shot
questions that full precision answered and the row did not, and the reverse. *Bits/weight*: what is stored of all matrices
in the decoder blocks, scales and zero points included; *size*: the checkpoint on disk, embeddings and head included.
*Time*: of quantizing, with that of the method it starts from, of generating its training text and of measuring which
layers need more bits. *Host*, *device*: the highest peaks of the steps' processes in main memory and in the accelerator's,
where one was used. *Training tokens*: all that were trained on on the way to the row. *Settings*: *paper*, if grid and
algorithm are as the method's paper has them (learning rates belong to the budget and are not counted); *ours*, if they
are what was best on the tuning text; neither, where no option makes a method what its paper has."""


def table(cells: list[Cell], results: Results) -> Table | None:
    partial = partial_metrics(cells)
    scores = {metric for cell in cells for metric in results.comparisons[cell].flips if is_part(metric)}
    flips = "flips lost, won" + (" †" if scores & partial else "")
    several_caches = len({cell.value("kv_cache_bytes") for cell in cells if "kv_cache_bytes" in cell.metrics}) > 1
    on_a_device = any(cell.value("device_memory_mb") >= 0 for cell in cells)  # NaN is not
    rows = []
    for cell in cells:
        row = name_columns(cell, cells)
        for metric in headlines(results.measured):
            row[metric.column_heading + dagger(partial, metric.name)] = estimate(cell, metric, results)
        if scores:
            row[flips] = _flips(results.comparisons[cell].task_flips)
        row["bits/weight"] = number(cell.value("bits_per_weight"))
        row["size MB"] = number(cell.value("size_mb"))
        if several_caches:
            row["KV cache bytes"] = scaled(cell.value("kv_cache_bytes"), 1, "{:,.0f}")
        row["time min"] = scaled(cell.run.seconds, 60, "{:.1f}")
        row["host GB"] = scaled(cell.run.host_memory_mb, 1000, "{:.1f}")
        if on_a_device:
            row["device GB"] = scaled(cell.run.device_memory_mb, 1000, "{:.1f}")
        row["training tokens"] = scaled(cell.run.training_tokens, 1, "{:,.0f} " + cell.run.training_text)
        if any(c.as_in_paper is not None for c in cells):
            row["settings"] = word({True: "paper", False: "ours"}.get(cell.as_in_paper, ""))
        rows.append(row)
    return table_of(f"{cells[0].model}-main", ALL_METHODS, rows, NOTE)


def _flips(flips: list[Flips]) -> Entry:
    """Zero-shot questions that full precision answered and a cell did not, and the reverse."""
    lost, won = sum(f.worse for f in flips), sum(f.better for f in flips)
    return Entry(f"{lost}, {won}", lost, f"of {sum(f.n for f in flips)}") if flips else Entry("")
