"""Claims of a paper about INT8 and INT4, beside measurements: Hasan, arXiv 2411.06084.

Its models have 10M to 1B parameters and run on edge devices.
"""

from __future__ import annotations

from collections.abc import Callable

from reports.cells import Cell
from reports.comparisons import reference_of
from reports.document import PAPERS, Entry, Place, Table
from reports.metrics import DECODE_RATE, ENERGY, ENERGY_ESTIMATE
from reports.tables._entries import table_of, word
from reports.tree import Results

PLACE = Place(PAPERS, per_model=False, order=1)
NOTE = """\
The best cell of each model and width for each claim, named in brackets; weights only, as integers, by one step without
training. *Quality*: perplexity with a gamma, fixed or searched, relative to full precision's. *Smaller*: the checkpoint,
embeddings and head included, against 16 and against 32 bits for every parameter; the paper does not say at which width it
saw its most. *Throughput*: decoding with batch 1 against the same model in bf16 on this machine, and against fp32. *Energy*:
a decoded token's against bf16's; an estimate from bytes and operations is shown, but judges nothing."""

# Of a cell: the value that the best cell is chosen by, the entry to show, and whether the claim holds.
Verdict = tuple[float, Entry, str]
Measure = Callable[[Cell, Cell | None], Verdict | None]


def table(cells: list[Cell], results: Results) -> Table | None:
    rows = []
    for bits, claims in CLAIMS.items():
        for model in results.models:
            own = [cell for cell in results.of(model) if _is_claimed(cell, bits)]
            for claim, (text, measure) in claims.items():
                verdicts = [v for cell in own if (v := measure(cell, reference_of(cell, cells))) is not None]
                if verdicts:
                    _, entry, holds = max(verdicts, key=lambda v: v[0])
                    row = {"model": word(model), "claim": Entry(f"INT{bits}: {claim}"), "paper": Entry(text)}
                    rows.append(row | {"measured": entry, "holds here": word(holds)})
    return table_of("claims", "Claims of arXiv 2411.06084", rows, NOTE)


def _is_claimed(cell: Cell, bits: int) -> bool:
    """Whether a cell is of the kind that the paper is about: weights only, all integers of these bits, by one step of PTQ."""
    integers = cell.run.formats == {"integer"} and set(cell.bits.values()) == {bits}
    weights_only = not any(cell.run.grid.get(tokens) for tokens in ("activations", "kv_cache"))
    return cell.state == "done" and cell.run.kinds == ("ptq",) and integers and weights_only


def _quality(cell: Cell, reference: Cell | None) -> Verdict | None:
    if "gamma" not in cell.options or not reference or any("perplexity" not in c.metrics for c in (cell, reference)):
        return None
    change = cell.value("perplexity") / reference.value("perplexity") - 1
    return -change, _named(f"{100 * change:+.1f} %", cell), _yes_or_no(change <= 0.06)


def _smaller(cell: Cell, reference: Cell | None) -> Verdict | None:
    if "size_mb" not in cell.metrics:
        return None
    saved, saved32 = (1 - 1e6 * cell.value("size_mb") / (cell.run.parameters * size) for size in (2, 4))
    holds = "yes" if saved >= 0.68 else "of 32 bits" if saved32 >= 0.68 else "no"
    return saved, _named(f"{100 * saved:.0f} % of 16 bits, {100 * saved32:.0f} % of 32", cell), holds


def _with_batch_1(cell: Cell, name: str) -> bool:
    """Whether a metric of one sequence was measured, for the kernels and for bf16.

    A name without a batch is of the smallest batch that was timed.
    """
    batches = [timing["batch"] for timing in cell.speed.timings] if cell.speed else []
    return min(batches, default=0) == 1 and {name, f"{name}/bfloat16"} <= cell.metrics.keys()


def _faster(claimed: float) -> Measure:
    def measure(cell: Cell, reference: Cell | None) -> Verdict | None:
        if not _with_batch_1(cell, DECODE_RATE):
            return None
        ratio, ratio32 = (
            cell.value(DECODE_RATE) / cell.value(f"{DECODE_RATE}/{dense}") for dense in ("bfloat16", "float32")
        )
        return ratio, _named(f"{ratio:.1f} x ({ratio32:.1f} x fp32)", cell), _yes_or_no(ratio >= claimed)

    return measure


def _cheaper(claimed: float) -> Measure:
    def measure(cell: Cell, reference: Cell | None) -> Verdict | None:
        name = next((n for n in (ENERGY, ENERGY_ESTIMATE) if _with_batch_1(cell, n)), None)
        if name is None:
            return None
        saved = 1 - cell.value(name) / cell.value(f"{name}/bfloat16")
        how, holds = ("measured", _yes_or_no(saved >= claimed)) if name == ENERGY else ("estimate", "not measured")
        return saved, _named(f"{100 * saved:.0f} % less, {how}", cell), holds

    return measure


def _yes_or_no(holds: bool) -> str:
    return "yes" if holds else "no"


def _named(text: str, cell: Cell) -> Entry:
    return Entry(text, text, f"({cell.scheme}, {cell.method})")


# By bits: the claims, each in the paper's words and with its measure here.
CLAIMS: dict[int, dict[str, tuple[str, Measure]]] = {
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
