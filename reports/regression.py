"""The regression check: compare two result sets number by number.

python -m reports.regression tests/baselines/smoke.csv results/smoke
python -m reports.regression tests/baselines/smoke.csv results/smoke --update

A result set is a folder with a matrix.json, or a table of its numbers: a baseline written by --update, or the
results.parquet of a report. How far a number may be off is the first rule of the tolerances that fits it. Without one, it may
be off as far as the 95 % interval of the difference on the same items says, if both are folders; else by twice the
standard error of a difference of other items; else not at all. Seconds and memory are the machine's: they are in no baseline,
and between two folders they are compared where a rule says how.

A rule's tolerance has two sides, but for seconds and memory. A fault can make a number look better: a control that has not
been trained is nearer to full precision, and the error of a weight has no better side at all. An improvement that is meant
goes into the baseline.

Prints Markdown. Exits with 0, with 1 if a number got worse, left the tolerance of a rule, vanished or has another protocol,
and with 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from methods.core.job.files import atomic_path
from methods.core.job.sources import version_of
from reports.cells import Cell
from reports.comparisons import compare
from reports.metrics import find, significant
from reports.tree import read_results, tidy

KEY = ["model", "scheme", "method", "seed", "budget", "metric"]
COLUMNS = [*KEY, "value", "stderr", "higher_is_better", "protocol"]
PATTERNS = ("model", "scheme", "method", "metric")  # a rule may name a pattern for each
AMOUNTS = ("relative", "absolute")
SHOWN = 40  # numbers listed under a heading: a comment on a pull request has an end


@dataclass(frozen=True)
class ResultSet:
    """The numbers of a result set as `tidy` gives them, its cells if they are at hand, and why some have none."""

    numbers: pd.DataFrame
    cells: dict[tuple, Cell]
    absent: list[str]


@dataclass(frozen=True)
class Finding:
    """One number in both sets, or in one: "same", "within", "better", "worse", "too good" (better by more than a
    rule allows), "appeared", "vanished" or "protocol"."""

    kind: str
    key: tuple
    before: float = math.nan
    after: float = math.nan
    allowed: str = ""


def read(path: Path) -> ResultSet:
    """A result set. ValueError for anything else."""
    if path.name == "matrix.json":
        path = path.parent
    if (path / "matrix.json").is_file():
        results = read_results(path / "matrix.json")
        absent = [f"{cell.path}: {cell.reason}" for cell in results.cells if cell.reason]
        by_key = {(c.model, c.scheme, c.method, c.seed, c.budget or 0): c for c in results.cells}
        return ResultSet(_numbers(tidy(results)), by_key, absent)
    if not path.is_file():
        raise ValueError(f"there is no result set {path}: neither a folder with a matrix.json nor a table")
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a result set: its suffix is not one of {', '.join(readers)}")
    table = readers[path.suffix](path)
    if missing := set(COLUMNS) - set(table):
        raise ValueError(f"{path} is not a result set: it lacks the columns {', '.join(sorted(missing))}")
    if table.empty:
        raise ValueError(f"{path} has no numbers")
    return ResultSet(_numbers(table), {}, [])


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["metric"].notna()][COLUMNS].fillna({"protocol": ""}).set_index(KEY)


def read_tolerances(path: Path) -> list[dict[str, Any]]:
    """The rules of a file, in its order. ValueError for one that is not understood."""
    rules = yaml.safe_load(path.read_text()) or []
    if not isinstance(rules, list) or not all(map(_understood, rules)):
        wrong = rules if not isinstance(rules, list) else next(rule for rule in rules if not _understood(rule))
        keys = f"patterns for {', '.join(PATTERNS)}, and one of {' or '.join(AMOUNTS)} with a number"
        raise ValueError(f"{path}: {wrong} is not a tolerance; a list of mappings is expected, with {keys}")
    return rules


def _understood(rule: Any) -> bool:
    if not isinstance(rule, dict) or rule.keys() - {*PATTERNS, *AMOUNTS}:
        return False
    amounts = [rule[key] for key in AMOUNTS if key in rule]
    return (
        len(amounts) == 1
        and isinstance(amounts[0], (int, float))
        and all(isinstance(rule[key], str) for key in PATTERNS if key in rule)
    )


def findings(baseline: ResultSet, current: ResultSet, rules: Sequence[dict[str, Any]]) -> list[Finding]:
    """One finding for every number."""
    before, after = (results.numbers.to_dict("index") for results in (baseline, current))
    for key in before.keys() | after.keys():
        if find(key[-1]).machine_dependent and not (key in before and key in after and _rule(key, rules)):
            before.pop(key, None)
            after.pop(key, None)
    changed = [Finding("vanished", key, before=before[key]["value"]) for key in before if key not in after]
    changed += [Finding("appeared", key, after=after[key]["value"]) for key in after if key not in before]
    common = [key for key in before if key in after]
    return changed + [_finding(key, before[key], after[key], baseline, current, rules) for key in common]


def _finding(key: tuple, before: dict, after: dict, baseline: ResultSet, current: ResultSet, rules) -> Finding:
    values = before["value"], after["value"]
    if before["protocol"] != after["protocol"]:
        return Finding("protocol", key, *values)
    if values[0] == values[1] or all(map(math.isnan, values)):
        return Finding("same", key, *values)
    if any(map(math.isnan, values)):  # no number compares with it
        return Finding("worse" if math.isnan(values[1]) else "better", key, *values, "a number")
    beyond = "better" if (values[1] > values[0]) == bool(after["higher_is_better"]) else "worse"
    if rule := _rule(key, rules):
        if beyond == "better" and not find(key[-1]).machine_dependent:
            beyond = "too good"
        allowed = rule["absolute"] if "absolute" in rule else rule["relative"] * abs(values[0])
        text = f"± {rule['absolute']:g}" if "absolute" in rule else f"± {100 * rule['relative']:g} %"
    else:
        mine, theirs = (results.cells.get(key[:-1]) for results in (current, baseline))
        interval = compare([mine], [theirs], key[-1]) if mine and theirs else None
        if interval and math.isfinite(interval.high - interval.low):  # a single item has no interval
            kind = interval.verdict(bool(after["higher_is_better"]))
            return Finding("within" if kind == "tie" else kind, key, *values, "95 % interval")
        errors = [row["stderr"] for row in (before, after) if row["stderr"] and not math.isnan(row["stderr"])]
        allowed = 2 * math.hypot(*errors) if errors else 1e-6 * abs(values[0])
        text = f"± {significant(allowed)}"
    return Finding("within" if abs(values[1] - values[0]) <= allowed else beyond, key, *values, text)


def _rule(key: tuple, rules: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first rule that fits a number."""
    return next((r for r in rules if all(fnmatch(key[KEY.index(p)], r[p]) for p in PATTERNS if p in r)), None)


HEADINGS = {
    "worse": "Worse",
    "vanished": "Vanished",
    "protocol": "Scored in another way, so not compared",
    "too good": "Better than the tolerance allows: a fault, or an improvement for the baseline",
    "better": "Better",
    "appeared": "Appeared",
}
FAILS = ("worse", "vanished", "protocol", "too good")


def report(numbers: list[Finding], current: ResultSet, title: str) -> str:
    """Markdown, the worst first."""
    counts = {kind: sum(f.kind == kind for f in numbers) for kind in ("same", "within", *HEADINGS)}
    failed = any(counts[kind] for kind in FAILS)
    words = {"same": "equal", "within": "within tolerance", "protocol": "scored in another way"}
    summary = ", ".join(f"{n} {words.get(kind, kind)}" for kind, n in counts.items() if n)
    parts = [
        f"## Regression check of {title}: {'failed' if failed else 'passed'}",
        f"{len(numbers)} numbers: {summary}.",
    ]
    for kind, heading in HEADINGS.items():
        chosen = sorted((f for f in numbers if f.kind == kind), key=lambda f: -_change(f))
        if not chosen:
            continue
        rows = [_row(f) for f in chosen[:SHOWN]]
        more = f"\n\nand {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
        table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
        parts.append(f"### {heading} ({len(chosen)})\n\n{table}{more}")
    if others := other_versions(current):
        again = "What an upgrade changes shows only when the cells are run again: `snakemake --forceall`."
        parts.insert(2, f"These numbers were not made with what is installed: {', '.join(others)}. {again}")
    if current.absent:
        parts.append("### Cells without a result\n\n" + "\n".join(f"- {line}" for line in current.absent))
    return "\n\n".join(parts) + "\n"


def other_versions(current: ResultSet) -> list[str]:
    """Libraries of which numbers at hand were made with another version than is installed."""
    records = itertools.chain.from_iterable(cell.provenance for cell in current.cells.values())
    made = {pair for record in records for pair in record.get("versions", {}).items()}
    return [f"{name} {old} for {new}" for name, old in sorted(made) if (new := version_of(name) or "none") != old]


def _change(finding: Finding) -> float:
    """Relative change of a number, to sort by; 0 for one without a counterpart."""
    change = abs(finding.after - finding.before) / (abs(finding.before) or 1)
    return 0.0 if math.isnan(change) else change


def _row(finding: Finding) -> dict[str, str]:
    model, scheme, method, seed, budget, metric = finding.key
    replicate = f"seed{seed}" + (f"-tokens{budget}" if budget else "")
    row = {"cell": f"{model}/{scheme}/{method}/{replicate}", "metric": metric}
    row |= {"baseline": _text(finding.before), "current": _text(finding.after)}
    relative = finding.before and not math.isnan(finding.before + finding.after)
    row["change"] = f"{100 * (finding.after / finding.before - 1):+.2f} %" if relative else ""
    return row | {"tolerance": finding.allowed}


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def update(path: Path, current: ResultSet) -> None:
    """Write the numbers of a result set as a baseline: text, a number a line, in the order of the matrix.

    ValueError if a cell has no result: a baseline with holes would let them pass for ever.
    """
    if current.absent:
        raise ValueError("cells without a result:\n  " + "\n  ".join(current.absent))
    table = current.numbers.reset_index()
    table = table[[not find(metric).machine_dependent for metric in table["metric"]]]
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reports.regression", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", type=Path)
    parser.add_argument("current", type=Path)
    parser.add_argument(
        "--tolerances", type=Path, metavar="FILE", help="default: NAME.tolerances.yaml beside NAME.csv, if there is one"
    )
    parser.add_argument("--update", action="store_true", help="then write CURRENT's numbers to BASELINE, a .csv file")
    args = parser.parse_args()
    try:
        if args.update and args.baseline.suffix != ".csv":
            raise ValueError(f"--update writes a .csv file, not {args.baseline}")
        beside = args.baseline.with_suffix(".tolerances.yaml")
        rules = read_tolerances(args.tolerances or beside) if args.tolerances or beside.is_file() else []
        current = read(args.current)
        numbers = []
        if args.baseline.exists() or not args.update:
            numbers = findings(read(args.baseline), current, rules)
            print(report(numbers, current, f"`{args.current}` against `{args.baseline}`"))
        if args.update:
            update(args.baseline, current)
            print(f"wrote {args.baseline}", file=sys.stderr)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    sys.exit(any(f.kind in FAILS for f in numbers) and not args.update)


if __name__ == "__main__":
    main()
