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
# What is drawn, if it was measured: metric, axis label, factor, whether on a log scale.
PANELS = (
    ("perplexity", "perplexity (lower is better)", 1, True),
    ("zero_shot_avg8", "zero-shot average of 8 in % (higher is better)", 100, False),
    ("kl_mean", "KL from full precision in nats (lower is better)", 1, True),
)


class _PlainLogFormatter(LogFormatter):
    """Writes 0.6 where LogFormatter writes 6e-01."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:g}"


def quality_against_size(cells: pd.DataFrame, model: str, path: Path) -> None:
    """Each metric against true bits per weight: a point per quantized cell with its standard error, full precision a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    panels = [panel for panel in PANELS if panel[0] in cells and cells[panel[0]].notna().any()]
    size = (1.5 + 5 * len(panels), 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    # Rows that are not quantized would push all others to the left edge; the control is in the table.
    methods = sorted(m for m in cells["method"].unique() if (cells[cells["method"] == m]["bits_per_weight"] < 16).any())
    for panel, ax in zip(panels, axes[0], strict=True):
        _draw(ax, cells, methods, *panel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(len(labels), 4 * len(panels)))
    figure.suptitle(model)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _draw(ax, cells: pd.DataFrame, methods: list[str], metric: str, label: str, factor: float, log: bool) -> None:
    done = cells[cells[metric].notna()]
    reference = done[done["method"] == REFERENCE]
    for value in reference[metric].head(1):
        if value > 0 or not log:  # full precision has no divergence from itself
            ax.axhline(factor * value, color="0.4", linestyle="--", linewidth=1, label="full precision")
    for i, method in enumerate(methods):
        rows = done[done["method"] == method].sort_values("bits_per_weight")
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 7, "capsize": 3}
        errors = factor * rows[f"{metric}_stderr"].astype(float)
        ax.errorbar(rows["bits_per_weight"], factor * rows[metric], yerr=errors, label=method, **style)
    quantized = done[done["method"].isin(methods)]
    for scheme, rows in quantized.groupby("scheme"):
        lowest = factor * (rows[metric] - rows[f"{metric}_stderr"].astype(float).fillna(0)).min()
        place = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": "0.3"}
        ax.annotate(scheme, (rows["bits_per_weight"].iloc[0], lowest), **place)
    if log:
        ax.set_yscale("log")
        for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis(_PlainLogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    ax.margins(x=0.15, y=0.15)
    ax.set_xlabel("bits per weight, scales and zero points included")
    partial = cells[f"{metric}_partial"].eq(True).any() if f"{metric}_partial" in cells else False
    ax.set_ylabel(label + (" †" if partial else ""))
    ax.grid(alpha=0.25)
