"""The report's contents: every section in its order, with its texts, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable

from methods.core.job import registry
from reports import prose
from reports.document import ANSWER, OF_A_MODEL, OF_THE_REPORT, QAT_AGAINST_PTQ, Figure, Part, Section
from reports.figures import caption
from reports.figures._charts import specification
from reports.tree import Results
from reports.verify import Verification


def contents(results: Results, folder: str, verification: Verification) -> list[Section]:
    """The whole report of a result tree; `folder`: of its tables and figures, beside the report."""
    cells = results.cells
    common = _parts(results, None)
    answer = [prose.progress(cells), prose.sentences(results.answers, results.crossings), *common.pop(ANSWER, [])]
    sections = [_section(ANSWER, 2, answer)]
    for model in results.models:
        sections.append(_section(model, 2, [prose.note(results, model), prose.LEGEND]))
        parts = _parts(results, model)
        sections += [_section(title, 3, parts.get(title, [])) for title in _ordered(OF_A_MODEL, parts)]
    sections += [_section(title, 2, common.get(title, [])) for title in _ordered(OF_THE_REPORT, common)]
    sections += [
        _section("Cells without a result", 2, [prose.absent(cells)]),
        _section("Departures from the plan", 2, [prose.departures(cells)]),
        _section("Provenance", 2, [prose.provenance(results, verification)]),
        _section("Reproduce", 2, [prose.reproduce(results, folder)]),
    ]
    return [section for section in sections if section]


def _ordered(known: tuple[str, ...], titles: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*known, *titles]))


def _section(title: str, level: int, parts: Iterable[Part | None]) -> Section | None:
    """A section of the parts that are not empty; None if all are."""
    kept = [part for part in parts if part]
    return Section(title, level, kept) if kept else None


def _parts(results: Results, model: str | None) -> dict[str, list[Part]]:
    """Tables, texts and figures by section: those of a model, or with None those of the whole report."""
    cells = results.of(model) if model else results.cells
    parts: dict[str, list[Part]] = {}
    for module in _modules("reports.tables", model):
        if table := module.table(cells, results):
            parts.setdefault(module.PLACE.section, []).append(table)
    if model is not None:
        parts.setdefault(QAT_AGAINST_PTQ, []).extend(prose.controls(cells, results))
    for module in _modules("reports.figures", model):
        if drawn := specification(module.chart, cells, results):
            kind = module.__name__.rpartition(".")[2]
            parts.setdefault(module.PLACE.section, []).append(Figure(kind, model or "all", drawn, caption(kind)))
    return parts


def _modules(package: str, model: str | None) -> list:
    """The modules of a package whose table or figure is of a model, or else of the whole report, in their order.

    ValueError if one of them stands in a section that there is not.
    """
    modules = []
    for name in registry.names(package):
        try:
            modules.append(registry.load(package, name))
        except ValueError as error:
            raise ValueError(f"{package}.{name}: {error}") from error
    chosen = [module for module in modules if module.PLACE.per_model == (model is not None)]
    return sorted(chosen, key=lambda module: module.PLACE.order)
