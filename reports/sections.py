"""What the report says, in order: each section's texts, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable

from methods.core.job import registry
from reports import texts
from reports.blocks import Block, Figure, Section
from reports.charts import specification
from reports.figures import caption
from reports.results import Results

CONTROLS = "QAT against the best PTQ"  # has the training controls in words, too
ANSWER = "Is QAT worth it?"
# Sections whose tables and figures are found by the folders. One that only a table or a figure names comes after these.
OF_A_MODEL = (
    "All methods",
    CONTROLS,
    "Against full precision",
    "Mixed precision",
    "Scaling factor gamma",
    "Speed and energy",
    "Training",
    "Layers",
    "Tasks",
    "Spread over seeds",
)
OF_THE_REPORT = ("Beside the papers",)  # after the models; the answer is before them


def sections(results: Results, folder: str) -> list[Section]:
    """The whole report of a result tree; `folder`: of its tables and figures, beside the report."""
    cells = results.cells
    common = _blocks(results, None)
    answer = [texts.progress(cells), texts.sentences(results.answers), *common.pop(ANSWER, [])]
    parts = [_section(ANSWER, 2, answer)]
    for model in results.models:
        parts.append(_section(model, 2, [texts.note(results, model), texts.LEGEND]))
        blocks = _blocks(results, model)
        parts += [_section(title, 3, blocks.get(title, [])) for title in _ordered(OF_A_MODEL, blocks)]
    parts += [_section(title, 2, common.get(title, [])) for title in _ordered(OF_THE_REPORT, common)]
    parts += [
        _section("Cells without a result", 2, [texts.absent(cells)]),
        _section("Departures from the plan", 2, [texts.departures(cells)]),
        _section("Provenance", 2, [texts.provenance(results)]),
        _section("Reproduce", 2, [texts.reproduce(results, folder)]),
    ]
    return [part for part in parts if part]


def _ordered(known: tuple[str, ...], titles: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*known, *titles]))


def _section(title: str, level: int, blocks: Iterable[Block | None]) -> Section | None:
    """A section of the blocks that are not empty; None if all are."""
    kept = [block for block in blocks if block]
    return Section(title, level, kept) if kept else None


def _blocks(results: Results, model: str | None) -> dict[str, list[Block]]:
    """Tables, texts and figures by section: those of a model, or with None those of the whole report."""
    cells = results.cells if model is None else results.of(model)
    blocks: dict[str, list[Block]] = {}
    for module in _modules("reports.tables", model):
        if table := module.table(cells, results):
            blocks.setdefault(module.PLACE.section, []).append(table)
    if model is not None:
        blocks.setdefault(CONTROLS, []).extend(texts.controls(cells))
    for module in _modules("reports.figures", model):
        if drawn := specification(module.chart, cells, results.methods):
            kind = module.__name__.rpartition(".")[2]
            blocks.setdefault(module.PLACE.section, []).append(Figure(kind, model or "all", drawn, caption(kind)))
    return blocks


def _modules(package: str, model: str | None) -> list:
    """The modules of a package whose table or figure is of a model, or else of the whole report, in their order."""
    modules = [registry.load(package, name) for name in registry.names(package)]
    chosen = [module for module in modules if module.PLACE.per_model == (model is not None)]
    return sorted(chosen, key=lambda module: module.PLACE.order)
