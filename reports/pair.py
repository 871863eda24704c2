"""How much methods differ, item by item and seed by seed: a method against a rival, in every metric that both have by item.

python -m reports.pair results/seeds peqa-from-qronos:qronos-after-fine_tune qronos:gptq

Differences are the method's less the rival's, with the 95 % interval of the report, which draws items and seeds. They are not
corrected for how many are looked at, and the methods are those that are named: the best of many is partly lucky (answer.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from reports.answer import by_scheme
from reports.cells import Cell
from reports.comparisons import Replicates, by_method, compare
from reports.metrics import find, is_part
from reports.statistics import Interval
from reports.tree import read_results

COLUMNS = ("model", "scheme", "training tokens", "method", "against", "metric", "difference", "p", "with each seed")


def table(cells: list[Cell], pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Rows of COLUMNS. ValueError for a pair that no scheme has."""
    rows = []
    for mine, theirs in pairs:
        found = [row for group in _both(cells, mine, theirs) for row in _rows(*group)]
        if not found:
            methods = sorted({cell.method for cell in cells if cell.samples})
            raise ValueError(f"no scheme has results of {mine} and of {theirs}; there are: {', '.join(methods)}")
        rows += found
    return rows


def _both(cells: list[Cell], mine: str, theirs: str) -> Iterator[tuple[Replicates, Replicates]]:
    """The cells of two methods by model, scheme and budget; what does not train has none, and is there for every budget."""
    for group in by_scheme(cells).values():
        methods = by_method(group)
        of_mine, of_theirs = ([m for m in methods if m[0].method == name] for name in (mine, theirs))
        for a, b in itertools.product(of_mine, of_theirs):
            if a[0].budget == b[0].budget or None in (a[0].budget, b[0].budget):
                yield a, b


def _rows(mine: Replicates, theirs: Replicates) -> list[list[str]]:
    first, rows = mine[0], []
    budget = first.budget or theirs[0].budget
    start = [first.model, first.scheme, f"{budget:,}" if budget else "", first.method, theirs[0].method]
    own = [name for name in first.samples if not is_part(name) and find(name).stands_in_for not in first.samples]
    for metric in own:
        if interval := compare(mine, theirs, metric):
            value, low, high = map(find(metric).change.written, (interval.value, interval.low, interval.high))
            alone = _of_seeds(mine, theirs, metric)
            rows.append([*start, metric, f"{value} [{low}, {high}]", f"{interval.p:.2g}", alone])
    return rows


def _of_seeds(mine: Replicates, theirs: Replicates, metric: str) -> str:
    """The difference with each seed that both have, where these are several."""
    own = {cell.seed: cell for cell in mine}
    shared = [(own[cell.seed], cell) for cell in theirs if cell.seed in own]
    alone: list[tuple[int, Interval | None]] = [(a.seed, compare([a], [b], metric)) for a, b in shared]
    told = [f"{find(metric).change.written(interval.value)} ({seed})" for seed, interval in alone if interval]
    return ", ".join(told) if len(told) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reports.pair", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a result tree, as results/default")
    parser.add_argument("pairs", nargs="+", metavar="METHOD:RIVAL")
    args = parser.parse_args()
    pairs = [tuple(pair.split(":")) for pair in args.pairs]
    if wrong := [pair for pair, names in zip(args.pairs, pairs, strict=True) if len(names) != 2]:
        sys.exit(f"error: {wrong[0]!r} is not METHOD:RIVAL, as peqa-from-gptq:gptq-after-fine_tune")
    try:
        rows = table(read_results(args.results / "matrix.json").cells, pairs)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(tabulate(rows, headers=COLUMNS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
