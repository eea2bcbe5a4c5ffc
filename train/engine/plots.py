"""PNGs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from train.engine.tracking import read_metrics

SMALLEST_CELL, LARGEST_CELL = 72, 128  # pixels a side of an image in a grid, wide enough for its caption


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw loss, accuracy (or the other metrics of evaluation) and learning rate over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    names = {name for line in lines for name in line if name.startswith(("train/", "val/"))}
    extra = {f"train/{name}" for name in ("learning_rate", "grad_norm", "clip_rate", "skipped_steps", "epoch_loss")}
    quantities = sorted(
        {name.split("/")[1].removeprefix("ema_") for name in names - extra}, key=lambda q: (q != "loss", q)
    )
    panels = []
    for quantity in quantities:
        parts = sorted(name for name in names if name.startswith(f"val/{quantity}/"))  # of groups of samples
        panels.append((quantity, [f"train/{quantity}", f"val/{quantity}", f"val/ema_{quantity}", *parts]))
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


def draw_images(path: Path, rows: Sequence[tuple[str, torch.Tensor]], captions: Sequence[str]) -> None:
    """Draw rows of images, each with a title, and captions below the last row.

    Args:
        path: of the PNG.
        rows: title, and images [N, C, H, W] in [0, 1] with 1 or 3 channels.
        captions: one for each column; words apart by two blanks stand below each other.
    """
    from PIL import Image, ImageDraw

    height, width = rows[0][1].shape[2:]
    side = max(height, width)
    scale = max(1.0, SMALLEST_CELL / side) if side < LARGEST_CELL else LARGEST_CELL / side
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    words = [caption.split("  ") for caption in captions]
    lines = max((len(parts) for parts in words), default=0)
    top, step = 16, cell[1] + 20
    pitch = max(cell[0], SMALLEST_CELL) + 4  # captions need as much
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (columns * pitch + 4, len(rows) * step + 14 * lines + 4), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (title, images) in enumerate(rows):
        pen.text((4, row * step + 2), title, fill="black")
        for column, pixels in enumerate((images.clamp(0, 1) * 255).round().byte()):
            image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
            method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
            canvas.paste(image.resize(cell, method), (4 + column * pitch, row * step + top))
    for column, parts in enumerate(words):
        for line, word in enumerate(parts):
            pen.text((4 + column * pitch, len(rows) * step + 14 * line), word, fill="black")
    canvas.save(path)
