"""The parts of a report, as data that Markdown and HTML render alike: sections of texts, tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Sections whose tables and figures are found by the folders.
ALL_METHODS = "All methods"
QAT_AGAINST_PTQ = "QAT against the best PTQ"
AGAINST_FULL_PRECISION = "Against full precision"
MIXED_PRECISION = "Mixed precision"
GAMMA = "Scaling factor gamma"
SPEED = "Speed and energy"
TRAINING = "Training"
LAYERS = "Layers"
TASKS = "Tasks"
SEEDS = "Spread over seeds"
OF_A_MODEL = (  # in their order
    ALL_METHODS,
    QAT_AGAINST_PTQ,
    AGAINST_FULL_PRECISION,
    MIXED_PRECISION,
    GAMMA,
    SPEED,
    TRAINING,
    LAYERS,
    TASKS,
    SEEDS,
)
ANSWER = "Is QAT worth it?"  # before the models
PAPERS = "Beside the papers"  # after them
OF_THE_REPORT = (ANSWER, PAPERS)


@dataclass(frozen=True)
class Place:
    """Where a table or a figure stands: the section, of each model or else of the whole report, and its order among others.

    new: whether the section is one that this file does not list. Such a section comes after those listed.
    """

    section: str
    per_model: bool = True
    order: int = 0
    new: bool = False

    def __post_init__(self):
        listed = OF_A_MODEL if self.per_model else OF_THE_REPORT
        if not self.new and self.section not in listed:
            whose = "a model" if self.per_model else "the whole report"
            raise ValueError(
                f"{self.section!r} is no section of {whose}; these are {', '.join(map(repr, listed))}; "
                f"a section of its own says Place({self.section!r}, new=True)"
            )


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


Part = str | Table | Figure  # a string is Markdown


@dataclass(frozen=True)
class Section:
    """A heading of level 2 or 3, and the parts under it."""

    title: str
    level: int
    parts: list[Part]
