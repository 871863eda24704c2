"""A figure as PNG and SVG, and what draws it in a browser."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import vl_convert

from reports.document import Figure

VERSION = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # of Vega-Lite, as Altair writes it
FONT = "Liberation Sans, Arial, sans-serif"  # vl-convert has the first; one of the system it opens for every letter
LARGE = 1_000_000  # characters of SVG from which a figure, of hundreds of cells, is large enough as it is


def save(figure: Figure, folder: Path) -> None:
    """Write FOLDER/MODEL.png and .svg."""
    config = figure.specification["config"] | {"font": FONT}
    specification = figure.specification | {"background": "white", "config": config}
    svg = vl_convert.vegalite_to_svg(specification, vl_version=VERSION)
    (folder / f"{figure.model}.svg").write_text(svg, encoding="utf-8")
    scale = 1.5 if len(svg) < LARGE else 1
    (folder / f"{figure.model}.png").write_bytes(vl_convert.svg_to_png(svg, scale=scale))


def libraries() -> str:
    """Vega, Vega-Lite and vega-embed as JavaScript."""
    return vl_convert.javascript_bundle(vl_version=VERSION)
