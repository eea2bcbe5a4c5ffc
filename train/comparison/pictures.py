"""Curves of groups of runs; nothing here needs a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.comparison.analysis import Group
from train.comparison.report import Report, make_plain

LONGEST_LABEL = 60
MARKED = 40  # points of a curve that still get a mark each


def draw_png(report: Report, metrics: Sequence[str] = (), *, dark: bool = False) -> bytes:
    """Return a PNG with a panel for each metric, by default the report's and the training loss.

    A group of several runs is the line of their mean in a band of one standard deviation to either side.
    """
    metrics = metrics or panels(report)
    style: Any = matplotlib.style.library["dark_background"] if dark else {}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4.2 * len(metrics)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, metric in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics):
            draw_panel(axes, report.groups, metric)
        content = io.BytesIO()
        figure.savefig(content, dpi=130, transparent=bool(dark))
    return content.getvalue()


def panels(report: Report) -> list[str]:
    """Return the metrics that are drawn."""
    has_loss = any(run.curve("train/loss") for run in report.runs)
    return list(dict.fromkeys([report.metric, *(["train/loss"] if has_loss else [])]))


def draw_panel(axes: Any, groups: Sequence[Group], metric: str) -> None:
    """Draw a metric of all groups against the step; past ten groups colours come again with other lines."""
    for number, group in enumerate(groups):
        _draw_group(axes, group, metric, ("-", "--", ":", "-.")[number // 10 % 4])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_group(axes: Any, group: Group, metric: str, line: str) -> None:
    curves = [dict(curve) for one in group.members if (curve := one.run.curve(metric))]
    if not curves:
        return
    # Of a band every point is over the same runs; without steps that all have, the first run stands for the group.
    steps = sorted(set.intersection(*map(set, curves))) or sorted(curves[0])
    whole = [curve for curve in curves if curve.keys() >= set(steps)]
    values = np.array([[curve[step] for step in steps] for curve in whole])
    label = make_plain(group.label).replace("$", r"\$")
    label = label if len(label) <= LONGEST_LABEL else f"{label[:LONGEST_LABEL]}…"
    label += f" (mean of {len(whole)})" if len(whole) > 1 else ""
    marker = "." if len(steps) < MARKED else ""
    (drawn,) = axes.plot(steps, values.mean(axis=0), line, label=label, marker=marker, linewidth=1.4)
    if len(whole) > 1:
        middle, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
        axes.fill_between(steps, middle - spread, middle + spread, alpha=0.2, color=drawn.get_color(), linewidth=0)
