"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from reports.blocks import Block, Figure, Section, Table
from reports.render import table


def markdown(title: str, sections: Iterable[Section], figures: str) -> str:
    """The whole report; `figures`: the folder of the figures, relative to the report."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [_block(block, section, figures) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, section: Section, figures: str) -> str:
    if isinstance(block, Table):
        return table.markdown(block)
    if isinstance(block, Figure):
        return f"![{section.title} of {block.model}]({figures}/{block.path})\n\n*{block.caption}*"
    return block
