"""Speed and energy of every cell that was timed, a row for each batch size."""

from __future__ import annotations

from typing import Any

import numpy as np

from reports.cells import Cell
from reports.document import SPEED, Entry, Place, Table
from reports.metrics import ENERGY, ENERGY_ESTIMATE, significant
from reports.tables._entries import name_columns, number, scaled, table_of, word
from reports.tree import Results

PLACE = Place(SPEED)
NOTE = """\
Medians over repeats, with the middle half of them in brackets; *x bf16*, *x fp32*: decoding against the same model with
16-bit and 32-bit weights, timed in turns with it in one process. *Latency*: of one decoding step, which gives each sequence
of the batch a token. *Limit*: steps per second if weights of this size were read at the bandwidth that was measured, and the
share of it that the fastest repeat reached. *Logit error*: of the kernels, relative to the checkpoint in fp32; nothing is
timed that is off by more than twice bf16's error plus 0.01. *No kernel*: why is under the departures."""
ESTIMATED = """\
 *Energy* is an **estimate**, for this machine has no counter that could be read: bytes of weights read and multiply-adds,
times the constants of Horowitz (ISSCC 2014, 45 nm: 162.5 pJ a byte of DRAM, 1.5 pJ a multiply-add in 16 bits, 4.6 in 32)."""


def table(cells: list[Cell], results: Results) -> Table | None:
    rows = []
    for cell in [cell for cell in cells if cell.speed]:
        for batch in sorted({timing["batch"] for timing in cell.speed.timings}):
            rows.append(name_columns(cell, cells) | _speed(cell, batch))
    energy = ESTIMATED if any(ENERGY_ESTIMATE in cell.metrics for cell in cells) else ""
    return table_of(f"{cells[0].model}-hardware", SPEED, rows, NOTE + energy)


def _speed(cell: Cell, batch: int) -> dict[str, Entry]:
    kernel = cell.speed.kernel
    own = "packed" if kernel else None if cell.quantized else "bfloat16"
    row = {"kernel": word(kernel or ("bf16" if own else "none")), "batch": scaled(batch, 1, "{:.0f}")}
    if own is None:
        return row | {"decode tokens/s": Entry("no kernel")}
    timings = [timing for timing in cell.speed.timings if timing["batch"] == batch]
    decode = _seconds_per_token(timings, "decode")
    row["prefill tokens/s"] = _rate(_seconds_per_token(timings, "prefill")[own])
    row["decode tokens/s"] = _rate(decode[own])
    row["latency ms"] = scaled(float(np.median(decode[own])) * batch, 0.001, "{:.1f}")
    for name, dense in (("x bf16", "bfloat16"), ("x fp32", "float32")):
        row[name] = scaled(float(np.median(decode[dense]) / np.median(decode[own])), 1, "{:.2f}")
    first = batch == min(timing["batch"] for timing in cell.speed.timings)
    if first:
        row["weights MB"] = number(cell.value("weights_mb"))
        row["limit tokens/s"] = number(cell.speed.bandwidth / (1e6 * cell.value("weights_mb")))
        row["of it %"] = scaled(cell.value("decode_bandwidth_share"), 0.01, "{:.0f}")
        row["logit error"] = number(cell.value("logit_error"))
    for metric, name in ((ENERGY, "energy mJ/token"), (ENERGY_ESTIMATE, "energy mJ/token, estimated")):
        of_batch = metric if first else f"{metric}/batch{batch}"
        if of_batch in cell.metrics:
            row[name] = scaled(cell.value(of_batch), 0.001, "{:.1f}")
    return row


def _seconds_per_token(timings: list[dict[str, Any]], phase: str) -> dict[str, list[float]]:
    """Of each repeat, by the kind of weights."""
    seconds: dict[str, list[float]] = {}
    for timing in timings:
        if timing["phase"] == phase:
            seconds.setdefault(timing["weights"], []).append(timing["seconds"] / timing["tokens"])
    return seconds


def _rate(seconds: list[float]) -> Entry:
    """Median tokens per second, with the middle half of the repeats."""
    slow, middle, fast = (1 / float(q) for q in np.quantile(seconds, (0.75, 0.5, 0.25)))
    return Entry(significant(middle, 3), middle, f"[{significant(slow, 3)}, {significant(fast, 3)}]")
