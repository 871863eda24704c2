"""A figure as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import vl_convert

from reports.document import Figure

VERSION = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # of Vega-Lite, as Altair writes it
LARGE = 1_000_000  # characters of SVG from which a figure, of hundreds of cells, is large enough as it is


def save(figure: Figure, folder: Path) -> None:
    """Write FOLDER/MODEL.png and .svg."""
    svg = vl_convert.vegalite_to_svg(figure.specification | {"background": "white"}, vl_version=VERSION)
    (folder / f"{figure.model}.svg").write_text(svg, encoding="utf-8")
    scale = 1.5 if len(svg) < LARGE else 1
    (folder / f"{figure.model}.png").write_bytes(vl_convert.svg_to_png(svg, scale=scale))
