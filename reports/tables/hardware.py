"""Speed and energy of every cell that was timed, a row for each batch size."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from reports.cells import Cell
from reports.document import SPEED, Entry, Place, Table
from reports.metrics import ENERGY, ENERGY_ESTIMATE, LLAMA_CPP, significant
from reports.tables._entries import name_columns, number, scaled, table_of, word
from reports.tree import Results

PLACE = Place(SPEED)
NOTE = """\
Medians over repeats, with the middle half of them in brackets; *x bf16*, *x fp32*: decoding against the same model with
16-bit and 32-bit weights in PyTorch, timed in turns with it. *llama.cpp*: the checkpoint's GGUF export, whose types are
named, in a process of its own; activations are rounded to 8 bits where weights are in fewer than 16. *Latency*: of one
decoding step, which gives each sequence of the batch a token. *Limit*: steps per second if weights of this size were read
at the bandwidth that was measured, and the share of it that the fastest repeat reached. *Logit error*: relative to the
checkpoint in fp32; nothing is timed that is off by more than twice bf16's error plus 0.01, or, for llama.cpp, twice that
of rounding activations so. *No kernel*: why is under the departures."""
ESTIMATED = """\
 *Energy* is an **estimate**, for this machine has no counter that could be read: bytes of weights read and multiply-adds,
times the constants of Horowitz (ISSCC 2014, 45 nm: 162.5 pJ a byte of DRAM; a multiply-add in 8 bits 0.3, 16 1.5, 32 4.6)."""


def table(cells: list[Cell], results: Results) -> Table | None:
    rows = []
    for cell in [cell for cell in cells if cell.speed]:
        batches = sorted({timing["batch"] for timing in cell.speed.timings})
        for (engine, kernel), batch in itertools.product(_engines(cell), batches):
            rows.append(name_columns(cell, cells) | _speed(cell, engine, kernel, batch, first=batch == batches[0]))
    energy = ESTIMATED if any(name.startswith(ENERGY_ESTIMATE) for cell in cells for name in cell.metrics) else ""
    return table_of(f"{cells[0].model}-hardware", SPEED, rows, NOTE + energy)


def _engines(cell: Cell) -> list[tuple[str | None, str]]:
    """What computed the checkpoint as it would be used, as the timings call it, and its kernel; None if nothing here can."""
    engines: list[tuple[str | None, str]] = []
    if cell.speed.kernel:
        engines.append(("packed", cell.speed.kernel))
    elif not cell.quantized:
        engines.append(("bfloat16", "bf16"))
    if cell.speed.llama_cpp:
        engines.append((LLAMA_CPP, f"{LLAMA_CPP}, {cell.speed.llama_cpp}"))
    return engines or [(None, "none")]


def _speed(cell: Cell, own: str | None, kernel: str, batch: int, first: bool) -> dict[str, Entry]:
    row = {"kernel": word(kernel), "batch": scaled(batch, 1, "{:.0f}")}
    if own is None:
        return row | {"decode tokens/s": Entry("no kernel")}
    suffix = f"/{LLAMA_CPP}" if own == LLAMA_CPP else ""
    timings = [timing for timing in cell.speed.timings if timing["batch"] == batch]
    decode = _seconds_per_token(timings, "decode")
    row["prefill tokens/s"] = _rate(_seconds_per_token(timings, "prefill")[own])
    row["decode tokens/s"] = _rate(decode[own])
    row["latency ms"] = scaled(float(np.median(decode[own])) * batch, 0.001, "{:.1f}")
    for name, dense in (("x bf16", "bfloat16"), ("x fp32", "float32")):
        row[name] = scaled(float(np.median(decode[dense]) / np.median(decode[own])), 1, "{:.2f}")
    if first:
        row["weights MB"] = number(cell.value(f"weights_mb{suffix}"))
        row["limit tokens/s"] = number(cell.speed.bandwidth / (1e6 * cell.value(f"weights_mb{suffix}")))
        row["of it %"] = scaled(cell.value(f"decode_bandwidth_share{suffix}"), 0.01, "{:.0f}")
        row["logit error"] = number(cell.value(f"logit_error{suffix}"))
    for metric, name in ((ENERGY, "energy mJ/token"), (ENERGY_ESTIMATE, "energy mJ/token, estimated")):
        of_batch = metric + suffix + ("" if first else f"/batch{batch}")
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
