"""The report's contents: every section in its order, with its texts, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from methods.core.job import registry
from reports import prose
from reports.document import ANSWER, OF_A_MODEL, OF_THE_REPORT, QAT_AGAINST_PTQ, Figure, Part, Section
from reports.figures import caption
from reports.figures._charts import specification
from reports.tree import Results
from reports.verify import Verification


def contents(results: Results, folder: str, verification: Verification) -> Iterator[Section]:
    """The whole report of a result tree, section by section; `folder`: of its tables and figures, beside the report."""
    cells = results.cells
    common = _parts(results, None)
    answer = [prose.progress(cells), prose.sentences(results.answers, results.crossings), *common.pop(ANSWER, [])]
    yield from _section(ANSWER, 2, answer)
    for model in results.models:
        yield from _section(model, 2, [prose.note(results, model), prose.LEGEND])
        parts = _parts(results, model)
        for title in _ordered(OF_A_MODEL, parts):
            yield from _section(title, 3, parts.get(title, []))
    for title in _ordered(OF_THE_REPORT, common):
        yield from _section(title, 2, common.get(title, []))
    yield from _section("Cells without a result", 2, [prose.absent(cells)])
    yield from _section("Departures from the plan", 2, [prose.departures(cells)])
    yield from _section("Provenance", 2, [prose.provenance(results, verification)])
    yield from _section("Reproduce", 2, [prose.reproduce(results, folder)])


def _ordered(known: tuple[str, ...], titles: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*known, *titles]))


def _section(title: str, level: int, parts: Iterable[Part | None]) -> Iterator[Section]:
    """A section of the parts that are not empty, if there are any."""
    if kept := [part for part in parts if part]:
        yield Section(title, level, kept)


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
