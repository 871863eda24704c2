"""The parts of a report, as data that Markdown and HTML render alike: sections of text, tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a table or a figure stands: the section, of each model or else of the whole report, and its order among others.

    A section that `reports.sections` does not know comes after those that it knows.
    """

    section: str
    per_model: bool = True
    order: int = 0


@dataclass(frozen=True)
class Entry:
    """An entry of a table. `value` is what it sorts by and what a spreadsheet gets; `detail` is set smaller than `text`."""

    text: str
    value: float | str | None = None
    detail: str = ""
    mark: str = ""  # "best", or "tie" with the best


@dataclass(frozen=True)
class Table:
    """A table by its file name, its title, its columns' names, rows of entries, and a note for the reader."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart as a Vega-Lite specification, by the kind of figure it is and the model it is about."""

    kind: str
    model: str
    specification: dict[str, Any]
    caption: str

    @property
    def path(self) -> str:
        """Of its PNG under the folder of figures."""
        return f"{self.kind}/{self.model}.png"


Block = str | Table | Figure  # a string is Markdown


@dataclass(frozen=True)
class Section:
    """A heading of level 2 or 3, and the blocks under it."""

    title: str
    level: int
    blocks: list[Block]
