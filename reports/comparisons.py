"""Comparing cells: paired differences, the rivals of a cell, the best cell of a scheme and its ties."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reports.cells import CONTROL_PTQ, PTQ, QAT, Cell
from reports.metrics import REGISTER, is_part
from reports.statistics import Flips, Interval, Part, flips, mean_differences, resampled_differences

# From the difference of two means over windows to the change of a metric, by what its result file declares.
CHANGES = {"relative": lambda difference: float(np.expm1(difference)), "difference": lambda difference: difference}
SAME_SIZE = 0.01  # relative difference in stored bits up to which two checkpoints are of the same size

Replicates = Sequence[Cell]  # the cells of one method and budget, one for each seed
Halves = tuple[Replicates, Replicates]  # those to take for even items, and for odd ones


@dataclass(frozen=True)
class Comparisons:
    """How a cell compares with others, on the same items.

    rivals: the cell itself is not among them. "reference": full precision. "ptq", "control": for QAT, the best PTQ and the
    best PTQ of a model that was fine-tuned on the same texts with the same tokens (`best_method`). "uniform": for a cell
    whose layers differ in their bits, the same method at the same size with the same bits for all.

    changes: by metric and rival; the rival "best" is the cell with the metric's best value, of the same scheme and seed.
    best: the metrics in which the cell has the best value, and another cell is told apart from it. ties: those in which the
    cell is not told apart from the best, and those in which it is the best and no other cell is told apart from it. The best
    that seems better than full precision and is not told apart from that is a tie, too: such a value is luck.
    flips: changed answers against full precision, by the metric that a task is judged by.
    """

    rivals: dict[str, Cell]
    changes: dict[tuple[str, str], Interval]
    best: frozenset[str]
    ties: frozenset[str]
    flips: dict[str, Flips]

    @property
    def task_flips(self) -> list[Flips]:
        """Flips of the tasks that are part of an average. MMLU, say, has a column of its own."""
        return [flips for metric, flips in self.flips.items() if is_part(metric)]


def compare_cells(cells: Sequence[Cell]) -> dict[Cell, Comparisons]:
    """Each cell's comparisons. ValueError if two results of one protocol are of other items."""
    schemes = _grouped(cells, "model", "scheme")
    groups = _grouped(cells, "model", "scheme", "seed")
    rivals = {cell: rivals_of(cell, cells, schemes[cell.model, cell.scheme]) for cell in cells}
    flipped = {cell: _flips(cell, rivals[cell].get("reference")) for cell in cells}
    pairs: list[tuple[Cell, Cell, tuple[str, str]]] = []
    for cell in cells:
        for metric in cell.samples:
            if is_part(metric):
                continue  # of single tasks, the flips say more
            pairs += [(cell, rival, (metric, name)) for name, rival in rivals[cell].items()]
            best = best_cell(metric, cell, groups[cell.model, cell.scheme, cell.seed])
            pairs += [] if best is cell else [(cell, best, (metric, "best"))]
    intervals = compare_all([(([cell],) * 2, ([rival],) * 2, metric) for cell, rival, (metric, _) in pairs])
    changes: dict[Cell, dict[tuple[str, str], Interval]] = {cell: {} for cell in cells}
    for (cell, _, key), interval in zip(pairs, intervals, strict=True):
        if interval:
            changes[cell][key] = interval
    best, ties = _best_and_ties(groups.values(), changes)
    return {
        cell: Comparisons(rivals[cell], changes[cell], frozenset(best[cell]), frozenset(ties[cell]), flipped[cell])
        for cell in cells
    }


def _grouped(cells: Iterable[Cell], *keys: str) -> dict[tuple[Hashable, ...], list[Cell]]:
    groups: dict[tuple[Hashable, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(getattr(cell, key) for key in keys), []).append(cell)
    return groups


def compare(mine: Replicates, theirs: Replicates, metric: str) -> Interval | None:
    """How a metric of cells differs from that of others, paired item by item and seed by seed.

    None if a cell lacks the metric or the protocols differ. ValueError if the items differ under one protocol.
    """
    return compare_all([((mine,) * 2, (theirs,) * 2, metric)])[0]


def compare_all(comparisons: Sequence[tuple[Halves, Halves, str]]) -> list[Interval | None]:
    """`compare` for many at once, which is much faster; each half of the items may be of other cells."""
    parts = [_parts(*comparison) for comparison in comparisons]
    differences = iter(mean_differences([p for p in parts if p]))
    return [
        _told(next(differences), part, *comparison) if part else None
        for comparison, part in zip(comparisons, parts, strict=True)
    ]


def resample_all(comparisons: Sequence[tuple[Halves, Halves, str]]) -> tuple[np.ndarray, np.ndarray] | None:
    """The mean differences of comparisons on the same items, in the unit of the items, and draws of them, see
    `resampled_differences`; None if one of the comparisons cannot be made, or there are fewer than two items."""
    parts = [_parts(*comparison) for comparison in comparisons]
    if not all(parts) or min(stratum.shape[1] for stratum in parts[0][0]) < 2:
        return None
    return resampled_differences(parts)


def _told(difference: Interval, parts: list[Part], mine: Halves, theirs: Halves, metric: str) -> Interval:
    """A difference of means as the change of the metric; that of one task's answers has McNemar's p-value."""
    change = mine[0][0].metrics[metric].change
    if change:
        return difference.map(CHANGES[change])
    one_seed = len(parts) == 1 and len(parts[0][0]) == 1
    if one_seed and len(parts[0]) == 1 and mine[0] is mine[1] and theirs[0] is theirs[1]:
        before, after = (replicates[0][0].samples[metric][0].values for replicates in (theirs, mine))
        return replace(difference, p=flips(before, after).p)
    return difference


def _parts(mine: Halves, theirs: Halves, metric: str) -> list[Part] | None:
    """My values less theirs, by stratum, seed and item: one part for each set of seeds, and one for all of a single seed.

    With a seed all methods are calibrated and trained on the same text: what that does to all of them alike falls out. So of
    methods with several seeds only those seeds count that all of them have, unless these are fewer than two.
    """
    cells = [cell for replicates in (*mine, *theirs) for cell in replicates]
    if not all((*mine, *theirs)) or any(metric not in cell.samples for cell in cells):
        return None
    if len({cell.metrics[metric].protocol for cell in cells}) > 1:
        return None
    if len({tuple(stratum.digest for stratum in cell.samples[metric]) for cell in cells}) > 1:
        raise ValueError(f"two results of {metric} under one protocol are not of the same items")
    several = [{cell.seed for cell in replicates} for replicates in (*mine, *theirs) if len(replicates) > 1]
    common = set.intersection(*several) if several else set()
    parts: dict[tuple[int, ...], Part] = {}
    for sign, (even, odd) in ((1, mine), (-1, theirs)):
        halves = [(even, slice(None))] if even is odd else [(even, slice(0, None, 2)), (odd, slice(1, None, 2))]
        for replicates, items in halves:
            apart = len(replicates) == 1 or len(common) < 2
            counted = {cell.seed: cell for cell in replicates if apart or cell.seed in common}
            seeds = tuple(sorted(counted)) if len(counted) > 1 else ()
            shapes = [(len(counted), len(stratum.values)) for stratum in replicates[0].samples[metric]]
            part = parts.setdefault(seeds, [np.zeros(shape) for shape in shapes])
            for row, seed in enumerate(sorted(counted)):
                for values, stratum in zip(part, counted[seed].samples[metric], strict=True):
                    values[row, items] += sign * stratum.values[items]
    return [parts[seeds] for seeds in sorted(parts)]


def rivals_of(cell: Cell, cells: Sequence[Cell], scheme: Sequence[Cell]) -> dict[str, Cell]:
    """The cells that a cell is compared with in all its metrics, by their names in Comparisons.

    scheme: the cells of its model and scheme.
    """
    rivals = {"reference": reference_of(cell, cells), "uniform": _uniform_of(cell, cells)}
    if cell.kind == QAT and "perplexity" in cell.metrics:
        ptq, controls = (
            by_method(c for c in scheme if c.kind == kind and "perplexity" in c.metrics) for kind in (PTQ, CONTROL_PTQ)
        )
        rivals["ptq"] = _of_seed(best_method(ptq), cell.seed)
        rivals["control"] = _of_seed(best_method(controls_of(cell, controls)), cell.seed)
    return {name: rival for name, rival in rivals.items() if rival}


def reference_of(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    """The full-precision cell of the same model; None for itself, and if it has no results."""
    if cell.is_reference:
        return None
    return next((c for c in cells if c.is_reference and c.model == cell.model and c.metrics), None)


def _uniform_of(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    """For a cell whose layers differ in their bits: the same method at the same size with the same bits for all layers."""
    size = cell.value("bits_per_weight")
    if not cell.mixed or math.isnan(size):
        return None

    def apart(other: Cell) -> float:
        return abs(other.value("bits_per_weight") / size - 1)

    alike = [
        c
        for c in cells
        if (c.model, c.method, c.seed, c.run.grid) == (cell.model, cell.method, cell.seed, cell.run.grid)
        and c.run.formats == cell.run.formats
        and len(set(c.bits.values())) == 1
        and c.budget == cell.budget
        and apart(c) <= SAME_SIZE
    ]
    return min(alike, key=apart, default=None)


def _of_seed(replicates: Replicates, seed: int) -> Cell | None:
    """The cell of a seed, or the first of another."""
    return next((cell for cell in replicates if cell.seed == seed), replicates[0] if replicates else None)


def by_method(cells: Iterable[Cell]) -> list[Replicates]:
    """Cells that differ in nothing but their seeds together."""
    return list(_grouped(cells, "method", "budget").values())


def most_seeds(methods: Sequence[Replicates]) -> list[Replicates]:
    """Of methods that train, those with the most seeds. They alone compete for a verdict: of another it is in no interval
    what a seed does, and a lucky seed would be taken for a better method."""
    most = max(map(len, methods), default=0)
    return [replicates for replicates in methods if len(replicates) == most]


def best_method(methods: Sequence[Replicates], windows: slice | None = None) -> Replicates:
    """The method with the lowest `mean_loss` on the texts that all were scored on; empty without one.

    Of methods that are level on one text, two halves of that text choose different ones; what these differ in on another text
    would then be a part of the result (reports/LOG.md).
    """
    texts = shared_texts(methods, windows)
    return min(methods, key=lambda replicates: mean_loss(replicates, windows, texts), default=[])


def shared_texts(methods: Sequence[Replicates], windows: slice | None) -> list[str]:
    """The perplexities, of one text each, that all cells have; to choose by some of the windows, those with several."""

    def texts(cell: Cell) -> set[str]:
        several = {name for name, strata in cell.samples.items() if len(strata[0].values) > 1}
        return {metric.name for metric in REGISTER["perplexity"].everywhere(several if windows else cell.metrics)}

    return sorted(set.intersection(*(texts(cell) for replicates in methods for cell in replicates))) if methods else []


def mean_loss(replicates: Replicates, windows: slice | None, texts: Sequence[str]) -> float:
    """Mean log perplexity, over seeds and texts, each of which counts alike, of all windows (None) or of some of them;
    infinite where it is not a number."""

    def loss(cell: Cell, text: str) -> float:
        return float(cell.samples[text][0].values[windows].mean() if windows else np.log(cell.value(text)))

    value = float(np.mean([loss(cell, text) for cell in replicates for text in texts]))
    return math.inf if math.isnan(value) else value


def controls_of(qat: Cell, methods: Iterable[Replicates]) -> list[Replicates]:
    """Of methods that quantize a fine-tuned model, those trained on the same texts as a QAT cell, on as much of them, with
    the most seeds."""
    read = qat.run.trained_on, qat.run.text_tokens
    return most_seeds([cells for cells in methods if (cells[0].run.trained_on, cells[0].run.text_tokens) == read])


def best_cell(metric: str, cell: Cell, group: Iterable[Cell]) -> Cell:
    """Of the cells of a scheme, the one with the best value of a cell's metric under the same protocol."""
    entry = cell.metrics[metric]
    same = [c for c in group if metric in c.metrics and c.metrics[metric].protocol == entry.protocol]
    return (max if entry.higher_is_better else min)(same, key=lambda c: c.value(metric))


def _best_and_ties(
    groups: Iterable[Sequence[Cell]], changes: dict[Cell, dict[tuple[str, str], Interval]]
) -> tuple[dict[Cell, set[str]], dict[Cell, set[str]]]:
    """The metrics in which each cell is the best of its group, and those in which it ties with the best.

    The best is marked as such only if some other is told apart from it, and if it does not seem better than full precision by
    luck; else it is one of the tied.
    """
    best: dict[Cell, set[str]] = {cell: set() for cell in changes}
    ties: dict[Cell, set[str]] = {cell: set() for cell in changes}
    for group in groups:
        for metric in {metric for cell in group for metric in cell.metrics}:
            others = [cell for cell in group if (metric, "best") in changes[cell]]
            if not others:
                continue
            higher = others[0].metrics[metric].higher_is_better
            tied = [cell for cell in others if changes[cell][metric, "best"].verdict(higher) == "tie"]
            leader = best_cell(metric, others[0], group)
            whole = changes[leader].get((metric, "reference"))
            lucky = whole and (whole.value > 0) == higher and whole.verdict(higher) == "tie"
            (ties if lucky or len(tied) == len(others) else best)[leader].add(metric)
            for cell in tied:
                ties[cell].add(metric)
    return best, ties


def _flips(cell: Cell, reference: Cell | None) -> dict[str, Flips]:
    """Flips against full precision by the metric of each task. ValueError if the questions differ."""
    flipped = {}
    for task, metric in cell.scores.items():
        if reference is None or metric not in cell.samples or metric not in reference.samples:
            continue
        (mine,), (theirs,) = cell.samples[metric], reference.samples[metric]
        if mine.digest != theirs.digest:
            raise ValueError(f"two results of {task} under one protocol are not of the same items")
        flipped[metric] = flips(theirs.values, mine.values)
    return flipped
