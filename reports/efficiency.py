"""Tables of what quantization buys: mixed precision at equal size, the kernels' speed and energy, the claims of a paper.

The paper is Hasan's (arXiv 2411.06084): models from 10M to 1B parameters on edge devices, INT8 and INT4.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from reports.results import REFERENCE, reference_of
from reports.tables import Entry, Table, against, name_columns, number, scaled, significant, table, word

ESTIMATE = "decode_joules_per_token_estimate"
MEASURED = "decode_joules_per_token"


def mixed(cells: pd.DataFrame, model: str) -> Table | None:
    """Each cell whose layers differ in their bits, against the same method at the same size with the same bits for all."""
    rows = []
    for cell in [cell for cell in cells.to_dict("records") if len(set(cell["bits"].values())) > 1]:
        layers = Counter(cell["bits"].values())
        row = name_columns(cell, cells) | {"bits/weight": number(cell.get("bits_per_weight"))}
        row["layers by bits"] = Entry(", ".join(f"{bits}: {layers[bits]}" for bits in sorted(layers)))
        row["uniform"] = word(cell["uniform"]) if cell["uniform"] else Entry("none of this size")
        row |= {
            name: against(cell, metric, "uniform")
            for metric, name in (("perplexity", "perplexity"), ("kl_mean", "KL"), ("zero_shot_avg8", "zero-shot"))
            if f"{metric}_against_uniform" in cells
        }
        rows.append(row)
    return table(f"{model}-mixed", "Mixed precision", rows, MIXED)


MIXED = """\
Change from *uniform*: the same method with the same number of bits for every layer, at the same stored size (within 1 %,
scales included). Perplexity in percent, KL in nats, accuracy in points, with the 95 % interval of the paired difference.
The bits come from calibration text, for methods too that see none themselves; the time that took is part of each cell's."""


def hardware(cells: pd.DataFrame, model: str) -> Table | None:
    """Speed of every cell that was timed, a row for each batch size."""
    rows = []
    for cell in [cell for cell in cells.to_dict("records") if cell["timings"]]:
        for batch in sorted({t["batch"] for t in cell["timings"]}):
            rows.append(_speed(cell, cells, batch))
    energy = ESTIMATED if any(ESTIMATE in found for found in cells["metrics"]) else ""
    return table(f"{model}-hardware", "Speed and energy", rows, HARDWARE + energy)


HARDWARE = """\
Medians over repeats, with the middle half of them in brackets; *x bf16*, *x fp32*: decoding against the same model with
16-bit and 32-bit weights, timed in turns with it in one process. *Latency*: of one decoding step, which gives each sequence
of the batch a token. *Limit*: steps per second if weights of this size were read at the bandwidth that was measured, and the
share of it that the fastest repeat reached. *Logit error*: of the kernels, relative to the checkpoint in fp32; nothing is
timed that is off by more than twice bf16's error plus 0.01. *No kernel*: why is under the departures."""
ESTIMATED = """\
 *Energy* is an **estimate**, for this machine has no counter that could be read: bytes of weights read and multiply-adds,
times the constants of Horowitz (ISSCC 2014, 45 nm: 162.5 pJ a byte of DRAM, 1.5 pJ a multiply-add in 16 bits, 4.6 in 32)."""


def _speed(cell: dict[str, Any], cells: pd.DataFrame, batch: int) -> dict[str, Entry]:
    seconds = {
        phase: {
            weights: [t["seconds"] / t["tokens"] for t in cell["timings"] if _is(t, weights, phase, batch)]
            for weights in dict.fromkeys(t["weights"] for t in cell["timings"])
        }
        for phase in ("prefill", "decode")
    }
    row = name_columns(cell, cells)
    kernel = cell["kernel"]
    own = "packed" if kernel else "bfloat16" if cell["method"] == REFERENCE else None
    row |= {"kernel": word(kernel or ("bf16" if own else "none")), "batch": scaled(batch, 1, "{:.0f}")}
    decode = seconds["decode"]
    if own:
        row["prefill tokens/s"] = _rate(seconds["prefill"][own])
        row["decode tokens/s"] = _rate(decode[own])
        row["latency ms"] = scaled(float(np.median(decode[own])) * batch, 0.001, "{:.1f}")
        for name, dense in (("x bf16", "bfloat16"), ("x fp32", "float32")):
            row[name] = scaled(float(np.median(decode[dense]) / np.median(decode[own])), 1, "{:.2f}")
    else:
        row["decode tokens/s"] = Entry("no kernel")
    if batch == min(t["batch"] for t in cell["timings"]) and own:
        row["weights MB"] = number(cell.get("weights_mb"))
        row["limit tokens/s"] = number(cell["bandwidth"] / (1e6 * cell["weights_mb"]))
        row["of it %"] = scaled(cell.get("decode_bandwidth_share"), 0.01, "{:.0f}")
        row["logit error"] = number(cell.get("logit_error"))
    suffix = "" if batch == min(t["batch"] for t in cell["timings"]) else f"/batch{batch}"
    for metric, name in ((MEASURED, "energy mJ/token"), (ESTIMATE, "energy mJ/token, estimated")):
        if own and f"{metric}{suffix}" in cell["metrics"]:
            row[name] = scaled(cell[f"{metric}{suffix}"], 0.001, "{:.1f}")
    return row


def _is(timing: dict[str, Any], weights: str, phase: str, batch: int) -> bool:
    return (timing["weights"], timing["phase"], timing["batch"]) == (weights, phase, batch)


def _rate(seconds: list[float]) -> Entry:
    """Median tokens per second, with the middle half of the repeats."""
    slow, middle, fast = (1 / float(q) for q in np.quantile(seconds, (0.75, 0.5, 0.25)))
    return Entry(significant(middle, 3), middle, f"[{significant(slow, 3)}, {significant(fast, 3)}]")


def claims(cells: pd.DataFrame) -> Table | None:
    """What Hasan's paper says of INT8 and INT4 beside what was measured here, where it was."""
    rows = cells.to_dict("records")
    found = []
    for bits, claimed in CLAIMS.items():
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [
                r
                for r in rows
                if r["model"] == model
                and r["state"] == "done"
                and set(r["bits"].values()) == {bits}
                and not any(r["apart_from_bits"][kind] for kind in ("activations", "kv_cache"))
                and r["kind"] == "ptq"
            ]
            for what, (text, measure) in claimed.items():
                measured = [m for r in own if (m := measure(r, reference_of(r, rows))) is not None]
                if measured:
                    value, entry, holds = max(measured, key=lambda m: m[0])
                    found.append(
                        {
                            "model": word(model),
                            "claim": Entry(f"INT{bits}: {what}"),
                            "paper": Entry(text),
                            "measured": entry,
                            "holds here": word(holds),
                        }
                    )
    return table("claims", "Claims of arXiv 2411.06084", found, CLAIMED)


CLAIMED = """\
The best cell of each model and width for each claim, named in brackets; weights only, without training. *Quality*:
perplexity with a gamma, fixed or searched, relative to full precision's. *Smaller*: the checkpoint, embeddings and head
included, against 16 and against 32 bits for every parameter; the paper does not say at which width it saw its most.
*Throughput*: decoding with batch 1 against the same model in bf16 on this machine, and against fp32. *Energy*: a decoded
token's against bf16's; an estimate from bytes and operations is shown, but judges nothing."""


def _quality(row: dict[str, Any], reference: dict[str, Any] | None):
    if row["gamma"] == "" or not reference or any("perplexity" not in r["metrics"] for r in (row, reference)):
        return None
    change = row["perplexity"] / reference["perplexity"] - 1
    return -change, _named(f"{100 * change:+.1f} %", row), _verdict(change <= 0.06)


def _smaller(row: dict[str, Any], reference: dict[str, Any] | None):
    if "size_mb" not in row["metrics"]:
        return None
    saved, saved32 = (1 - 1e6 * row["size_mb"] / (row["parameters"] * size) for size in (2, 4))
    holds = "yes" if saved >= 0.68 else "of 32 bits" if saved32 >= 0.68 else "no"
    return saved, _named(f"{100 * saved:.0f} % of 16 bits, {100 * saved32:.0f} % of 32", row), holds


def _with_batch_1(row: dict[str, Any], name: str) -> bool:
    """Whether a metric of one sequence was measured, for the kernels and for bf16; names without a batch are of the first."""
    batches = [t["batch"] for t in row["timings"]]
    return min(batches, default=0) == 1 and {name, f"{name}/bfloat16"} <= row["metrics"].keys()


def _faster(claimed: float):
    def measure(row: dict[str, Any], reference: dict[str, Any] | None):
        name = "decode_tokens_per_second"
        if not _with_batch_1(row, name):
            return None
        ratio, ratio32 = (row[name] / row[f"{name}/{dense}"] for dense in ("bfloat16", "float32"))
        return ratio, _named(f"{ratio:.1f} x ({ratio32:.1f} x fp32)", row), _verdict(ratio >= claimed)

    return measure


def _cheaper(claimed: float):
    def measure(row: dict[str, Any], reference: dict[str, Any] | None):
        name = next((n for n in (MEASURED, ESTIMATE) if _with_batch_1(row, n)), None)
        if name is None:
            return None
        saved = 1 - row[name] / row[f"{name}/bfloat16"]
        how, holds = ("measured", _verdict(saved >= claimed)) if name == MEASURED else ("estimate", "not measured")
        return saved, _named(f"{100 * saved:.0f} % less, {how}", row), holds

    return measure


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def _named(text: str, row: dict[str, Any]) -> Entry:
    return Entry(text, text, f"({row['scheme']}, {row['method']})")


# By bits: what is claimed, in the paper's words for it, and how it is measured here: of a row and full precision, the value
# that the best cell is chosen by, what is shown, and whether the claim holds.
CLAIMS = {
    8: {
        "quality with gamma": ("within 6 %", _quality),
        "smaller": ("up to 68 %", _smaller),
        "throughput": ("2.4 x", _faster(2.4)),
        "energy": ("40 % less", _cheaper(0.4)),
    },
    4: {
        "quality with gamma": ("within 6 %", _quality),
        "smaller": ("up to 68 %", _smaller),
        "throughput": ("3 x", _faster(3)),
        "energy": ("60 % less", _cheaper(0.6)),
    },
}
