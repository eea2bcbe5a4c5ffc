"""PNGs of a run."""

from __future__ import annotations

from pathlib import Path

from train.engine.tracking import read_metrics


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw loss, accuracy (or the other metrics of evaluation) and learning rate over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    names = {name for line in lines for name in line if name.startswith(("train/", "val/"))}
    extra = {"train/learning_rate", "train/grad_norm", "train/clip_rate", "train/skipped_steps"}
    quantities = sorted(
        {name.split("/")[1].removeprefix("ema_") for name in names - extra}, key=lambda q: (q != "loss", q)
    )
    panels = [(quantity, [f"train/{quantity}", f"val/{quantity}", f"val/ema_{quantity}"]) for quantity in quantities]
    panels.append(("learning rate", ["train/learning_rate"]))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in curves:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                marker = "." if len(points) < 40 else ""
                axes.plot(*zip(*points), label=name, marker=marker, linewidth=1.4)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)
