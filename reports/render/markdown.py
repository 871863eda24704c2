"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from reports.document import Figure, Part, Section, Table
from reports.render import table


def markdown(title: str, sections: Iterable[Section], figures: str) -> str:
    """The whole report; `figures`: the folder of the figures, relative to the report."""
    text = [f"# {title}"]
    for section in sections:
        text.append(f"{'#' * section.level} {section.title}")
        text += [_part(part, section, figures) for part in section.parts]
    return "\n\n".join(text) + "\n"


def _part(part: Part, section: Section, figures: str) -> str:
    if isinstance(part, Table):
        return table.markdown(part)
    if isinstance(part, Figure):
        return f"![{section.title} of {part.model}]({figures}/{part.path})\n\n*{part.caption}*"
    return part
