"""What the report says in words: the answers, training controls, missing results, departures, provenance."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping, Sequence

from methods.core.job.sources import commit
from reports.answer import VERDICTS, Answer, Difference, Measure, mean, measure_of
from reports.cells import CONTROL_PTQ, PTQ, QAT, QUANTIZED, Cell
from reports.crossing import Crossings, Curve
from reports.metrics import COSTS, REGISTER, significant
from reports.statistics import Estimate
from reports.tree import Results
from reports.verify import Verification

MOST_DEVIATIONS = 20  # that the report lists
LEGEND = """\
Each model's rows start from the same full-precision weights and are scored on the same items. ± is a standard error, over
windows of text or over questions. [...] is the 95 % interval of a paired comparison on the same items (bootstrap), so rows
can be told apart that ± alone cannot; *tie*: it holds zero, or McNemar's exact test of the flips does not reject at 5 %.
† marks a partial result: a limit left items out. A row with * departed from the plan, see below."""


def progress(cells: Sequence[Cell]) -> str:
    """How much of the matrix is done; empty if all is."""
    done = sum(cell.state == "done" for cell in cells)
    return "" if done == len(cells) else f"**Partial report: {done} of {len(cells)} cells are done.**"


def note(results: Results, model: str) -> str:
    """The configuration's note on a model."""
    text = results.config["models"][model].get("note")
    return f"> {' '.join(text.split())}" if text else ""


def sentences(answers: Sequence[Answer], crossings: Mapping[tuple[str, str], Crossings]) -> str:
    """The answers in words: one line per model and scheme. With several budgets it is about the crossing, which is one with
    plain PTQ, and the answer at the largest of them stands below it."""
    lines, last = [], {(a.model, a.scheme): a for a in answers}
    for key, a in last.items():
        best = crossings[key].best if key in crossings else None
        if best and a.verdict != "nothing to win":
            lines += [_crossing(best, a), f"  {_sentence(a)}"]
        else:
            lines.append(_sentence(a))
    return "\n".join(lines)


def _crossing(curve: Curve, answer: Answer) -> str:
    """From which budget on QAT is ahead of PTQ, and what it wins back. It is advice if the answer with the largest is."""
    ptq, qat, most = f"`{curve.ptq[0].method}`", f"`{curve.method}`", curve.budgets[-1]
    seeds = "one seed" if curve.seeds == 1 else f"{curve.seeds} seeds"
    chosen = f"; the halves of the windows choose {_and([f'`{m}`' for m in curve.halves])}" if curve.halves else ""
    text = f" of `{curve.ptq[0].metrics['perplexity'].text}`" if answer.several_texts else ""
    about = f"(by perplexity{text}; {seeds}{chosen})"
    told = f"{qat} is {_ahead(ptq, curve.crossing, curve.budgets)}"
    if curve.crossing.value == math.inf:
        told = f"no QAT method is ahead of {ptq} within {most:,} training tokens"
    elif curve.against_control:
        control = "the best PTQ of a model fine-tuned on as much"
        told += f", and {_ahead(control, curve.against_control, curve.budgets)}"
    later = max(
        curve.crossing, curve.against_control or curve.crossing, key=lambda crossing: (crossing.value, crossing.high)
    )
    line = f"- **{curve.model}, {curve.scheme}: {told}** {about}."
    if answer.verdict == "yes" and answer.settled and later.value < math.inf:
        use = f"use {qat} {_from(later, curve.budgets)}"
        if later.value:
            minutes = significant(curve.minutes(later.value), 2)
            tokens, between = crossing_words(later, curve.budgets)
            use = f"use PTQ below {tokens} {between} training tokens ({minutes} minutes here), {qat} from there on"
        line = f"- **{curve.model}, {curve.scheme}: {use}** {about}: {told}."
    for metric, (crossing, against_control) in curve.elsewhere.items():
        line += f" By {metric.heading} it is {_ahead('PTQ', crossing, curve.budgets)}"
        line += f", and {_ahead('fine-tuned PTQ', against_control, curve.budgets)}." if against_control else "."
    if curve.recovered:
        line += f" With {most:,} tokens {qat} wins back {_share(curve.recovered)} of what {ptq} loses"
        line += f", {_share(curve.beyond)} beyond fine-tuning on the same text." if curve.beyond else "."
    return line


def _ahead(rival: str, crossing: Estimate, budgets: Sequence[int]) -> str:
    """That a method is ahead of its rival and from which budget on, or that it is not."""
    if crossing.value == crossing.low == math.inf:
        return f"not ahead of {rival} within {budgets[-1]:,} training tokens"
    return f"ahead of {rival} {_from(crossing, budgets)}"


def _from(crossing: Estimate, budgets: Sequence[int]) -> str:
    """From which budget on a method is ahead, in words, with the interval."""
    if crossing.value == crossing.high == 0:
        return f"from {budgets[0]:,} training tokens on, the least that was tried"
    return f"from {' '.join(crossing_words(crossing, budgets))} training tokens on"


def crossing_words(crossing: Estimate, budgets: Sequence[int]) -> tuple[str, str]:
    """A crossing and its interval, to two digits as far as budgets were run."""

    def tokens(value: float) -> str:
        if 0 < value < math.inf:
            return f"{float(f'{value:.2g}'):,.0f}"
        return f"under {budgets[0]:,}" if value == 0 else f"over {budgets[-1]:,}"

    return tokens(crossing.value), f"[{tokens(crossing.low)}, {tokens(crossing.high)}]"


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _sentence(a: Answer) -> str:
    if a.verdict == "nothing to win":
        between = f"{100 * a.lost.value:+z.1f} % [{100 * a.lost.low:+z.1f}, {100 * a.lost.high:+z.1f}]"
        line = f"{_choice(a)}**{VERDICTS[a.verdict]}**: "
        most = " at most" if a.several_texts else ""
        return line + f"its perplexity is{most} {between} from full precision's, before any training."
    if not a.choice:
        return f"- **{a.model}, {a.scheme}**: only a fine-tuned model was quantized, so the question is open."
    line = _choice(a)
    if not a.qat:
        return line + "No QAT method has a result here, so the question is open."
    if not a.ptq:
        return line + "No PTQ method has a result here, so the question is open."
    if not a.verdict:
        return line + "Its PTQ and QAT were not scored on the same items, so the question is open."
    verdict = VERDICTS[a.verdict]
    if a.verdict in ("yes", "no", "mixed") and a.one_seed:
        what = "training" if 1 in (len(a.qat), len(a.control)) else "calibration"
        verdict = f"Open: {what} had one seed, by which {verdict.replace('The', 'the', 1)}"
    elif a.seeds_differ:
        verdict = f"Open: seeds differ; by all of them together {verdict.replace('The', 'the', 1)}"
    line += f"**{verdict}**. {_compared(a, PTQ)} {_beyond(a)} {_chosen(a)}"
    if a.halves:
        names = [f"{' and '.join(f'`{m}`' for m in methods)} ({QUANTIZED[kind]})" for kind, methods in a.halves.items()]
        line += f" The halves of the windows choose otherwise than all of them: {'; '.join(names)}; the differences are those"
        line += " of what one half chooses on the other, so they may be those of no pair of methods."
    if a.missing:
        line += f" It is open, for they were not compared in {_and([measure_of(name).heading for name in a.missing])}."
    if a.by_seed:
        line += f" With each seed alone, {_by_seed(a)}."
    costs = {cost.heading: a.times(cost.name) for cost in COSTS}
    known = [f"{ratio:.1f} times the {name}" for name, ratio in costs.items() if not math.isnan(ratio)]
    return line + (f" It costs {_and(known)} of `{a.ptq[0].method}`." if known else "")


def _by_seed(a: Answer) -> str:
    """Differences of the measures with each seed: from the control, where there is one, and else from PTQ."""
    whole = a.beyond or a.against_ptq
    alone = [beyond if a.beyond else against_ptq for against_ptq, beyond in a.by_seed.values()]
    told = []
    for name in whole:
        written = measure_of(name).metric.change.written
        changes = [written(own[name].interval.value) if name in own else "not compared" for own in alone]
        told.append(f"{measure_of(name).heading} {', '.join(changes)}")
    return "; ".join(told)


def _choice(a: Answer) -> str:
    """The method to use, or the two between which the question is open, with the budget of training."""
    budget = ""
    if a.qat and a.verdict != "nothing to win":
        seeds = "one seed" if len(a.qat) == 1 else f"{len(a.qat)} seeds"
        budget = f", at {a.qat[0].run.text_tokens:,.0f} training tokens, {seeds}"
    is_open = a.ptq and a.qat and a.verdict and not a.settled
    named = [(best, kind) for best, kind in ((a.ptq, "PTQ"), (a.qat, "QAT")) if is_open or best is a.choice]
    methods = [
        f"`{best[0].method}` ({kind}, perplexity {significant(mean(best, 'perplexity'))})" for best, kind in named
    ]
    return f"- **{a.model}, {a.scheme}{budget}: {'' if is_open else 'use '}{' or '.join(methods)}.** "


def _beyond(a: Answer) -> str:
    """The gain of QAT beyond fine-tuning, or the reason why it is not known."""
    if a.beyond:
        control, read = a.control[0], a.qat[0].run.text_tokens
        rates = f" (learning rate {control.run.rates})" if control.run.rates else ""
        told = f"Beyond fine-tuning on the same tokens{rates}: {_compared(a, CONTROL_PTQ)}"
        if control.run.calibration_tokens <= read:  # after rounding QAT reads all of it
            told += f" `{control.method}` is calibrated on {control.run.calibration_tokens:,.0f} tokens, no more than"
            told += " QAT reads, and may be better with more (`samples` under `calibration`)."
        if not a.ptq_fine_tuned:
            told += (
                f" `{a.ptq[0].method}`, the best PTQ, was not run on the fine-tuned model, where it may be better, too."
            )
        return told
    if a.control:
        return "A half of the windows chooses a QAT method on whose text no model was fine-tuned to compare it with."
    tokens, text = a.qat[0].run.text_tokens, a.qat[0].run.training_text
    return f"No model fine-tuned on {tokens:,.0f} tokens of `{text}` was quantized to compare it with."


def _compared(a: Answer, kind: str) -> str:
    """How QAT compares with the best PTQ, plain or of the fine-tuned model; by the halves' choices where they are others."""
    rival, differences = (a.ptq, a.against_ptq) if kind == PTQ else (a.control, a.beyond)
    told = [f"{(m := measure_of(name)).heading} {_change(d, m)}" for name, d in differences.items()]
    mine, theirs = (
        f"`{best[0].method}`" + (", or what a half of the windows chooses," if of in a.halves else "")
        for best, of in ((a.qat, QAT), (rival, kind))
    )
    return f"{mine} against {theirs}: {_and(told)}."


def _chosen(a: Answer) -> str:
    """Of how many methods the compared ones are the best, and of which not; with one seed the larger number has an edge."""
    numbers = {kind: n for kind, n in a.tried.items() if n}
    told = f"They are the best of {_and([f'{n} ({QUANTIZED[kind]})' for kind, n in numbers.items()])}"
    if a.one_seed and len(set(numbers.values())) > 1:
        told += "; the luck of a single seed favours the kind of which there are more"
    if a.absent:
        told += f". Without a result, so that it is open: {_and([f'`{method}`' for method in a.absent])}"
    return f"{told}."


def _change(difference: Difference, measure: Measure) -> str:
    """Size and outcome of a difference, with the number of items that would decide it."""
    needed = f", {difference.to_decide} would decide" if difference.to_decide else ""
    return f"{measure.metric.change.written(difference.interval.value)} ({difference.outcome}{needed})"


def _and(parts: list[str]) -> str:
    """A list in words."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def controls(cells: Sequence[Cell], results: Results) -> list[str]:
    """The effect of training alone, in words."""
    lines = []
    for cell in cells:
        interval = results.change(cell, "perplexity", "reference")
        if cell.kind == "control" and interval:
            between = f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
            lines.append(
                f"**Training control:** full precision trained on {cell.run.training_tokens:,.0f} tokens of "
                f"`{cell.run.training_text}` (`{cell.method}`, seed {cell.seed}) changes perplexity by "
                f"{100 * interval.value:+.1f} % {between}. The text alone does that. What a QAT method adds is its "
                "difference from that model quantized without training (*fine-tune, then PTQ*)."
            )
    return lines


def absent(cells: Sequence[Cell]) -> str:
    """The cells without a result, with the reasons."""
    return "\n".join(f"- {_name(cell)}: {cell.state}. {cell.reason}" for cell in cells if cell.state != "done")


def departures(cells: Sequence[Cell]) -> str:
    return "\n".join(f"- {_name(cell)}: {departure}" for cell in cells for departure in cell.departures)


def _name(cell: Cell) -> str:
    budget = f", {cell.budget:,} training tokens" if cell.budget else ""
    return f"{cell.model}, {cell.scheme}, {cell.method}, seed {cell.seed}{budget}"


def provenance(results: Results, verification: Verification) -> str:
    """Configuration, machine, code, texts, protocols and verification of all runs; empty if nothing ran."""
    cells, config = results.cells, results.config
    ran = [record for cell in cells for record in cell.provenance]
    if not ran:
        return ""

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(record[key]) for record in ran}))

    versions = "; or ".join(sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in ran}))
    dates = [record["date"] for record in ran]
    dtypes = sorted({cell.run.compute_dtype for cell in cells} - {""})
    calibration = config["calibration"]
    lines = [
        f"- configuration `{results.matrix['name']}`, results in `{results.path.parent}`, run between {min(dates)} and "
        f"{max(dates)}",
        f"- report: built {datetime.date.today()} by the code of {commit('reports/*.py')}, whose verdicts it has",
        f"- machine: {distinct('device')}; {distinct('cores')} cores, threads a job: {distinct('threads')}; computed in "
        f"{', '.join(dtypes)}",
        f"- code: {distinct('git_commit')}; Python {distinct('python')}; {versions}",
        f"- calibration: {calibration['samples']} sequences of {calibration['sequence_length']} tokens of "
        f"`{calibration['dataset']}`",
    ]
    budgets = sorted({cell.budget for cell in cells if cell.budget})
    if budgets:
        text = f"- training: {_and([f'{budget:,}' for budget in budgets])} tokens in sequences of "
        text += str(config["training"]["sequence_length"])
        lines.append(f"{text}, of `{config['training']['dataset']}` or generated by the model, as the tables say")
    lines += [*_protocols(cells), *_kl_floor(cells), *_verified(verification)]
    return "\n".join([*lines, "- every cell's `run.json` has its options, hashes, errors by layer, times"])


def _protocols(cells: Sequence[Cell]) -> list[str]:
    """How each evaluation scored: two protocols never share a column."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        for entry in cell.metrics.values():
            seconds.setdefault(entry.evaluation, {}).setdefault(entry.protocol, []).append(entry.seconds)
    return [
        f"- {evaluation}: `{protocol}`; {sum(taken) / len(taken):.0f} s a checkpoint"
        for evaluation, protocols in seconds.items()
        for protocol, taken in protocols.items()
    ]


def _verified(v: Verification) -> list[str]:
    """Whether the files fit each other, or which do not; the tensors are left to the command, which reads gigabytes."""
    command = f"`python -m reports.verify {v.folder}` reads the checkpoints, too"
    if not v.deviations:
        return [f"- verified: no deviation in {v.summary()}; {command}"]
    more = len(v.deviations) - MOST_DEVIATIONS
    told = [f"  - {each}" for each in v.deviations[:MOST_DEVIATIONS]] + ([f"  - and {more} more"] if more > 0 else [])
    return [f"- **not verified**, {len(v.deviations)} deviations in {v.summary()}; {command}", *told]


def _kl_floor(cells: Sequence[Cell]) -> list[str]:
    """The divergence that arithmetic alone makes, where it was measured."""
    floors = [cell.value(floor.name) for cell in cells for floor in REGISTER["kl_floor"].everywhere(cell.metrics)]
    if not floors:
        return []
    return [
        f"- KL floor: up to {significant(max(floors), 2)} nats per token between two runs of one model that differ in "
        "their batch's shape alone; a KL of that size says nothing"
    ]


def reproduce(results: Results, folder: str) -> str:
    """The commands that make the results and the report again. `folder`: that of tables and figures beside the report."""
    commits = {str(record["git_commit"]) for cell in results.cells for record in cell.provenance}
    whole = len(commits) <= 1 and not any(commit.endswith("-dirty") or commit == "None" for commit in commits)
    checkout = (
        "In a checkout of the commit above"
        if whole
        else "The code was not that of one commit (*code*, above), so no checkout makes just these numbers. In any"
    )
    extra = [name for name in results.matrix.get("configfiles", []) if name != "workflow/config/default.yaml"]
    options = ["--configfile", *extra, "--"] if extra else []
    command = shlex.join(["snakemake", "--cores", "8", *options, "reports/summary.md"])
    return (
        f"{checkout}, with `requirements.lock` installed:\n\n```bash\n{command}\n```\n\n"
        f"The report alone, from the results: `python -m reports.build {results.path} --output reports/summary.md`. Every "
        f"number is in `{folder}/results.parquet` (a row per cell and metric), the tables are in `{folder}/tables/` as CSV "
        f"and LaTeX, the figures in `{folder}/figures/` as PNG and SVG. Another run is compared with this one by "
        "`python -m reports.regression`."
    )
