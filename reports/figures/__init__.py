"""Figures of the report. One public module in this folder is one kind of figure; the folder is the registry.

A figure's module has two names:

    PLACE                         reports.document.Place: where it stands
    chart(cells, results, data)   an Altair chart of one model's cells, or None where there is nothing to draw. `results`:
                                  reports.tree.Results; its `methods` have the order that gives each its color and shape.
                                  `data`: a dict; the chart names its points by reports.figures._charts.add(data, points)

The first line of its docstring is its title in Snakemake's report, and NAME.rst beside it is its caption.
"""

from __future__ import annotations

import ast
from pathlib import Path

from methods.core.job import registry

FOLDER = Path(__file__).parent


def titles() -> dict[str, str]:
    """Kinds of figures with their titles. Nothing is imported, since Snakemake asks for them every time it starts."""
    docstrings = {kind: ast.get_docstring(ast.parse(_source(kind))) for kind in registry.names(__name__)}
    return {kind: docstring.splitlines()[0].removesuffix(".") for kind, docstring in docstrings.items()}


def _source(kind: str) -> str:
    return (FOLDER / f"{kind}.py").read_text(encoding="utf-8")


def caption(kind: str) -> str:
    """What a figure shows, in one paragraph."""
    return " ".join((FOLDER / f"{kind}.rst").read_text(encoding="utf-8").split())
