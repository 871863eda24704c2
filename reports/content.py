"""What the report says, in order: sections of text, tables and figures, which Markdown and HTML render alike."""

from __future__ import annotations

import datetime
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from methods.core.statistics import Interval
from reports import efficiency, tables
from reports.answer import EQUIVALENCE, VERDICTS, Answer, Difference, Differences, answers
from reports.figures import Figure, figures
from reports.papers import papers
from reports.results import QUANTIZED, REFERENCE, Side
from reports.tables import Table

Block = str | Table | Figure  # a string is Markdown

SIGNS = """\
Each model's rows start from the same full-precision weights and are scored on the same items. ± is a standard error, over
windows of text or over questions. [...] is the 95 % interval of a paired comparison on the same items (bootstrap), so rows
can be told apart that ± alone cannot; *tie*: it holds zero, or McNemar's exact test of the flips does not reject at 5 %.
† marks a partial result: a limit left items out. A row with * departed from the plan, see below."""


@dataclass(frozen=True)
class Section:
    """A heading of level 2 or 3 and what stands under it."""

    title: str
    level: int
    blocks: list[Block]


def sections(cells: pd.DataFrame, matrix: dict[str, Any], path: Path) -> list[Section]:
    """The whole report of a result tree; `path` is that of its matrix.json."""
    # Each method's colour is by its place: first those that quantize, then the control. Full precision is a line.
    rows = sorted(cells.to_dict("records"), key=lambda row: row["unquantized"])
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != REFERENCE))
    found = answers(cells, matrix["config"].get("equivalence", EQUIVALENCE))
    parts = [_section("Is QAT worth it?", 2, _progress(cells), _sentences(found), tables.answer(found))]
    for model, own in cells.groupby("model", sort=False):
        drawings = figures(own, str(model), methods)
        note = matrix["config"]["models"][model].get("note")
        parts += [
            _section(str(model), 2, f"> {' '.join(note.split())}" if note else None, SIGNS),
            _section("All methods", 3, tables.main(own, model), drawings.get("quality")),
            _section(
                "QAT against the best PTQ", 3, tables.against_ptq(own, model), *_controls(own), drawings.get("cost")
            ),
            _section("Against full precision", 3, tables.against_reference(own, model), drawings.get("flips")),
            _section("Mixed precision", 3, efficiency.mixed(own, model), drawings.get("allocation")),
            _section("Scaling factor gamma", 3, drawings.get("gamma")),
            _section("Speed and energy", 3, efficiency.hardware(own, model), drawings.get("speed")),
            _section("Training", 3, tables.training(own, model), drawings.get("training")),
            _section("Layers", 3, drawings.get("layers")),
            _section("Tasks", 3, tables.tasks(own, model)),
            _section("Spread over seeds", 3, tables.spread(own, model)),
        ]
    parts += [
        _section("Beside the papers", 2, papers(cells, matrix), efficiency.claims(cells)),
        _section("Cells without a result", 2, _absent(cells)),
        _section("Departures from the plan", 2, _departures(cells)),
        _section("Provenance", 2, _provenance(cells, matrix, path)),
        _section("Reproduce", 2, _reproduce(cells, matrix, path)),
    ]
    return [part for part in parts if part]


def _section(title: str, level: int, *blocks: Block | None) -> Section | None:
    """A section of what there is; None if there is nothing."""
    kept = [block for block in blocks if block]
    return Section(title, level, kept) if kept else None


def _progress(cells: pd.DataFrame) -> str:
    done = int((cells["state"] == "done").sum())
    return "" if done == len(cells) else f"**Partial report: {done} of {len(cells)} cells are done.**"


def _sentences(found: list[Answer]) -> str:
    """The answer in words: one line per model and scheme."""
    return "\n".join(_sentence(a) for a in found)


def _sentence(a: Answer) -> str:
    budget = ""
    if a.qat:
        seeds = "one seed" if len(a.qat) == 1 else f"{len(a.qat)} seeds"
        budget = f", at {a.qat[0]['training_tokens']:,.0f} training tokens, {seeds}"
    if not a.choice:
        return f"- **{a.model}, {a.scheme}**: only a fine-tuned model was quantized, so the question is open."
    open_question = a.ptq and a.qat and a.verdict not in ("yes", "no", "")
    named = [(side, kind) for side, kind in ((a.ptq, "PTQ"), (a.qat, "QAT")) if open_question or side is a.choice]
    sides = [
        f"`{side[0]['method']}` ({kind}, perplexity {tables.significant(tables.mean(side, 'perplexity'))})"
        for side, kind in named
    ]
    line = f"- **{a.model}, {a.scheme}{budget}: {'' if open_question else 'use '}{' or '.join(sides)}.** "
    if not a.qat:
        return line + "No QAT method has a result here, so the question is open."
    if not a.ptq:
        return line + "No PTQ method has a result here, so the question is open."
    if not a.verdict:
        return line + "Its PTQ and QAT were not scored on the same items, so the question is open."
    line += f"**{VERDICTS[a.verdict]}**. {_compared(a.qat, a.ptq, a.against_ptq)}"
    if a.beyond:
        line += f" Beyond fine-tuning on the same tokens: {_compared(a.qat, a.control, a.beyond)}"
    elif a.control:
        line += " A half of the windows chooses a QAT method on whose text no model was fine-tuned to compare it with."
    else:
        line += (
            f" No model fine-tuned on as many tokens of `{a.qat[0]['trained_on']}` was quantized to compare it with."
        )
    if a.halves:
        names = [f"{' and '.join(f'`{m}`' for m in methods)} ({QUANTIZED[kind]})" for kind, methods in a.halves.items()]
        line += f" The halves of the windows choose otherwise than all of them: {'; '.join(names)}."
    costs = {name: tables.times(a, cost) for cost, name in tables.COSTS.items()}
    known = [f"{ratio:.1f} times the {name}" for name, ratio in costs.items() if not math.isnan(ratio)]
    return line + (f" It costs {_and(known)} of `{a.ptq[0]['method']}`." if known else "")


def _compared(qat: Side, rival: Side, found: Differences) -> str:
    """How a QAT method compares with another, in words."""
    measures = [f"{tables.MEASURES[measure]} {_change(difference, measure)}" for measure, difference in found.items()]
    return f"`{qat[0]['method']}` against `{rival[0]['method']}`: {_and(measures)}."


def _change(difference: Difference, measure: str) -> str:
    """Size and outcome of a difference, with what would decide it."""
    value = difference.interval.value
    if measure == "kl":
        text = f"{value:+.3f}"
    elif measure == "perplexity":
        text = f"{100 * value:+.1f} %"
    else:
        text = f"{100 * value:+.1f} points"
    needed = tables.to_decide(difference)
    return f"{text} ({difference.outcome}{f', {needed} would decide' if needed else ''})"


def _and(parts: list[str]) -> str:
    """A list in words."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _controls(cells: pd.DataFrame) -> list[str]:
    """What training alone did, in words."""
    lines = []
    for cell in cells.to_dict("records"):
        interval = cell.get("perplexity_against_reference")
        if cell["kind"] == "control" and isinstance(interval, Interval):
            between = f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
            lines.append(
                f"**Training control:** full precision trained on {cell['training_tokens']:,.0f} tokens of "
                f"`{cell['trained_on']}` (`{cell['method']}`, seed {cell['seed']}) changes perplexity by "
                f"{100 * interval.value:+.1f} % {between}. So much comes from that text alone. What a QAT method adds is its "
                "difference from that model quantized without training (*fine-tune, then PTQ*)."
            )
    return lines


def _absent(cells: pd.DataFrame) -> str:
    absent = cells[cells["state"] != "done"]
    return "\n".join(f"- {_cell(c)}: {c['state']}. {c['reason']}" for c in absent.to_dict("records"))


def _departures(cells: pd.DataFrame) -> str:
    return "\n".join(f"- {_cell(c)}: {d}" for c in cells.to_dict("records") for d in c["departures"])


def _cell(cell: dict[str, Any]) -> str:
    return f"{cell['model']}, {cell['scheme']}, {cell['method']}, seed {cell['seed']}"


def _provenance(cells: pd.DataFrame, matrix: dict[str, Any], path: Path) -> str:
    ran = [provenance for found in cells["provenance"] for provenance in found]
    if not ran:
        return ""

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(p[key]) for p in ran}))

    versions = "; or ".join(sorted({", ".join(f"{k} {v}" for k, v in p["versions"].items()) for p in ran}))
    dtypes = sorted(cells["compute_dtype"].dropna().unique())
    calibration, training = matrix["config"]["calibration"], matrix["config"].get("training")
    lines = [
        f"- configuration `{matrix['name']}`, results in `{path.parent}`, run between {min(p['date'] for p in ran)} and "
        f"{max(p['date'] for p in ran)}; report built {datetime.date.today()}",
        f"- machine: {distinct('device')}; {distinct('cores')} cores, threads a job: {distinct('threads')}; computed in "
        f"{', '.join(dtypes)}",
        f"- code: {distinct('git_commit')}; Python {distinct('python')}; {versions}",
        f"- calibration: {calibration['samples']} sequences of {calibration['sequence_length']} tokens of "
        f"`{calibration['dataset']}`",
    ]
    if training and cells["training_tokens"].notna().any():
        text = f"- training: {training['tokens']:,} tokens in sequences of {training['sequence_length']}"
        lines.append(f"{text}, of `{training['dataset']}` or generated by the model, as the tables say")
    return "\n".join(
        lines + _protocols(cells) + ["- every cell's `run.json` has its options, hashes, errors by layer, times"]
    )


def _protocols(cells: pd.DataFrame) -> list[str]:
    """How each evaluation scored: two protocols never share a column."""
    found: dict[str, dict[str, float]] = {}
    for cell in cells.to_dict("records"):
        for entry in cell["metrics"].values():
            seconds = found.setdefault(entry["evaluation"], {}).setdefault(entry["protocol"], [])
            seconds.append(cell[f"{entry['evaluation']}_seconds"])
    return [
        f"- {evaluation}: `{protocol}`; {sum(seconds) / len(seconds):.0f} s a checkpoint"
        for evaluation, protocols in found.items()
        for protocol, seconds in protocols.items()
    ] + _kl_floors(cells)


def _kl_floors(cells: pd.DataFrame) -> list[str]:
    """The divergence that arithmetic alone makes, where it was measured."""
    floors = [entry["value"] for found in cells["metrics"] for name, entry in found.items() if name == "kl_floor"]
    if not floors:
        return []
    return [
        f"- KL floor: up to {tables.significant(max(floors), 2)} nats per token between two runs of one model that differ in "
        "their batch's shape alone; a KL of that size says nothing"
    ]


def _reproduce(cells: pd.DataFrame, matrix: dict[str, Any], path: Path) -> str:
    commits = {str(provenance["git_commit"]) for found in cells["provenance"] for provenance in found}
    whole = len(commits) <= 1 and not any(commit.endswith("-dirty") or commit == "None" for commit in commits)
    checkout = (
        "In a checkout of the commit above"
        if whole
        else ("The code was not that of one commit (*code*, above): a run of any may differ. In a checkout of the last")
    )
    extra = [name for name in matrix.get("configfiles", []) if name != "workflow/config/default.yaml"]
    options = ["--configfile", *extra, "--"] if extra else []
    command = shlex.join(["snakemake", "--cores", "8", *options, "reports/summary.md"])
    return (
        f"{checkout}, with `requirements.lock` installed:\n\n```bash\n{command}\n```\n\n"
        f"The report alone, from the results: `python -m reports.build {path} --output reports/summary.md`. Every number "
        "is in `results.parquet` (a row per cell and metric), the tables are in `tables/` as CSV and LaTeX, the figures in "
        "`figures/` as PNG and SVG. Another run is compared with this one by `python -m reports.compare`."
    )
