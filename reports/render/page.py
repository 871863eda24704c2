"""The report as one HTML file that needs no network: DataTables for the tables, Vega for the figures, both embedded."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import itables
import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from reports.document import Figure, Section, Table
from reports.render.table import numeric_columns

BUNDLES = Path(itables.__file__).parent / "html"  # DataTables and its extensions, as itables packs them


def page(title: str, sections: list[Section], figures: str, libraries: str) -> str:
    """The page, complete.

    figures: the folder of the figures as images, relative to the page. libraries: what draws them, as JavaScript.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markdown": _html, "chart": _specification, "numeric_columns": numeric_columns}
    environment.tests |= {
        "table": lambda part: isinstance(part, Table),
        "figure": lambda part: isinstance(part, Figure),
    }
    return environment.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        figures=figures,
        datatables_css=Markup((BUNDLES / "dt_bundle.css").read_text(encoding="utf-8")),
        datatables_js=base64.b64encode((BUNDLES / "dt_bundle.js").read_bytes()).decode(),
        vega_js=Markup(libraries.replace("</script", "<\\/script")),
    )


def _html(text: str) -> Markup:
    """Markdown without raw HTML and without images, which a model's note might have, and which a browser would fetch."""
    return Markup(MarkdownIt("commonmark", {"html": False}).disable("image").render(text))


def _specification(figure: Figure) -> Markup:
    """A chart as JSON that can stand in a script element."""
    text = json.dumps(figure.specification, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
