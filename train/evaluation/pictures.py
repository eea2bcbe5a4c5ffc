"""PNGs of what a classifier answers; nothing here needs a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_NUMBERED = 20  # classes up to which the cells of a confusion matrix hold their counts
MOST_NAMED = 60  # classes up to which the axes have names
LONGEST_NAME = 24


def draw_confusion_matrix(counts: Any, names: Sequence[str], path: Path) -> None:
    """Draw how often which class was taken for which; the colour is the share of the true class.

    Args:
        counts: whole numbers [K, K], a row for each true class.
        names: of the K classes.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(counts)
    num_classes = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(14.0, 3.0 + 0.42 * num_classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    if num_classes <= MOST_NUMBERED:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    if num_classes <= MOST_NAMED:
        shown = [_shorten(name) for name in names]
        axes.set_xticks(range(num_classes), shown, rotation=90, fontsize=8)
        axes.set_yticks(range(num_classes), shown, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.savefig(path, dpi=110)


def _shorten(name: str) -> str:
    plain = name.replace("$", r"\$")  # matplotlib takes text between two of them for a formula
    return plain if len(plain) <= LONGEST_NAME else f"{plain[:LONGEST_NAME]}…"


def draw_reliability(calibration: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against confidence, of the bins that `calibrate` returned, and how many samples each bin has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = calibration["bins"]
    figure = Figure(figsize=(4.6, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = [one["from"] for one in bins], [one["to"] - one["from"] for one in bins]
    upper.bar(left, [one["accuracy"] for one in bins], width, align="edge", edgecolor="white", label="accuracy")
    upper.plot([one["confidence"] for one in bins], [one["accuracy"] for one in bins], "k.", label="mean confidence")
    upper.plot([0, 1], [0, 1], "--", color="tab:gray", label="as sure as right")
    upper.set_ylabel("accuracy")
    upper.set_title(f"expected calibration error {calibration['ece']:.4f}", fontsize=10)
    upper.legend(fontsize=8, loc="upper left")
    lower.bar(left, [one["samples"] for one in bins], width, align="edge", edgecolor="white", color="tab:gray")
    lower.set_ylabel("samples")
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    figure.savefig(path, dpi=110)
