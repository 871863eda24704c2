"""Figures of the report."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogFormatter

from reports.results import REFERENCE

# Okabe and Ito's colours, told apart by the colour-blind. As many markers plus one, so that no pair occurs twice.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"


def quality_against_size(cells: pd.DataFrame, model: str, path: Path) -> None:
    """Perplexity against true bits per weight, a point per cell with its standard error, full precision as a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    done = cells[cells["perplexity"].notna()]
    reference = done[done["method"] == REFERENCE]
    for value in reference["perplexity"].head(1):
        axes.axhline(value, color="0.4", linestyle="--", linewidth=1, label="full precision")
    # Rows that are not quantized would push all others to the left edge; the control is in the table.
    methods = sorted(m for m in cells["method"].unique() if (cells[cells["method"] == m]["bits_per_weight"] < 16).any())
    for i, method in enumerate(methods):
        rows = done[done["method"] == method].sort_values("bits_per_weight")
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 7, "capsize": 3}
        axes.errorbar(
            rows["bits_per_weight"], rows["perplexity"], yerr=rows["perplexity_stderr"], label=method, **style
        )
    quantized = done[done["method"].isin(methods)]
    for scheme, rows in quantized.groupby("scheme"):
        lowest = rows.loc[rows["perplexity"].idxmin()]
        place = {"xytext": (0, -16), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": "0.3"}
        axes.annotate(scheme, (lowest["bits_per_weight"], lowest["perplexity"]), **place)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("bits per weight, scales and zero points included")
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.set_title(model)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
