"""The look before a run: what the network is about to see, as text and as a picture."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from data_modules.splits import Arrays, DataModule, Slot
from data_modules.tables import NumberColumn, TablePreprocessing
from data_modules.text import TextPreprocessing, sample_lines

if TYPE_CHECKING:
    from data_modules.loader import TrainingLoader
    from data_modules.stream import StreamLoader

UNEVEN = 10  # the largest class has so many times the samples of the smallest: worth a warning
SHOWN = 5  # texts
COLUMNS, CELL = 8, 64  # images in a row of the picture, and pixels that a small one is enlarged to


def look_at_data(data: DataModule, loader: TrainingLoader | StreamLoader, run: Path | None) -> None:
    """Print what the first batch and any classes look like; with a run's folder, keep that and a picture there."""
    # In this process: starting loader processes for one batch would take longer than the batch.
    slot = next(dataclasses.replace(loader, num_workers=0).batches(0, 0)).slots[0]
    lines = [*_describe_batch(data, slot), *(_describe_classes(data) if data.class_names else [])]
    preprocessing = data.preprocessing
    train = data.train
    rows = torch.arange(len(train)) if train.rows is None else train.rows
    if isinstance(preprocessing, TablePreprocessing):
        lines += table_statistics(preprocessing, train.samples, rows)  # type: ignore[arg-type]
    if isinstance(preprocessing, TextPreprocessing):
        shown = torch.arange(0, len(train), max(1, len(train) // SHOWN))[:SHOWN]
        labels = train.labels[shown]
        lines += sample_lines(preprocessing, train.samples, rows[shown], data.class_names, labels)  # type: ignore[arg-type]
    print("\n".join(lines), flush=True)
    if run is None:
        return
    (run / "data.txt").write_text("\n".join([*data.notes, *lines, ""]), encoding="utf-8")
    if data.skipped:
        (run / "skipped_samples.txt").write_text("\n".join([*data.skipped, ""]), encoding="utf-8")
    if data.inputs.task == "image":
        draw_batch(data, slot, run / "plots" / "first_batch.png")


def _describe_batch(data: DataModule, slot: Slot) -> list[str]:
    lines = []
    for name in data.inputs.names:
        tensor = slot.batch[name][: slot.count]
        if not tensor.numel():
            continue
        values, kind = tensor.double(), str(tensor.dtype).removeprefix("torch.")
        lines.append(
            f"first batch, {name}: {kind} {list(tensor.shape)}, min {values.min():.4g}, max {values.max():.4g}, mean "
            f"{values.mean():.4g}, std {values.std():.4g}"
        )
    return lines


def _describe_classes(data: DataModule) -> list[str]:
    counts = torch.bincount(data.train.labels, minlength=len(data.class_names))
    order = counts.argsort(descending=True, stable=True).tolist()
    shown = [f"{data.class_names[number]} {counts[number]:,}" for number in order]
    if len(shown) > 12:
        shown = [*shown[:6], "...", *shown[-5:]]
    lines = [f"classes: {', '.join(shown)}"]
    present = counts[counts > 0]
    if present.max() >= UNEVEN * present.min():
        lines.append(
            f"warning: the largest class has {present.max() / present.min():.0f} times the samples of the smallest; "
            "--class_balance weights or --class_balance sampler evens them out"
        )
    return lines


def table_statistics(preprocessing: TablePreprocessing, samples: Arrays, chosen: torch.Tensor) -> list[str]:
    """Return an aligned line for each column, for a look at the data before a run.

    Args:
        preprocessing: What was fitted on the rows of training.
        samples: The encoded split.
        chosen: The rows of training that were not rejected, int64.
    """
    numbers, categories = (samples.tensors[name][chosen] for name in ("numbers", "categories"))
    number_place, category_place = 0, 0
    table: list[tuple[str, str, str, str]] = []
    for column in preprocessing.columns:
        if isinstance(column, NumberColumn):
            values = numbers[:, number_place].double() * column.std + column.mean
            missing = float(numbers[:, preprocessing.indicators[column.name]].mean()) if column.indicator else 0.0
            # Samples are float32: what is below a hundred-thousandth of the deviation is rounding.
            digits = 5 - math.floor(math.log10(column.std))
            low, high = (round(float(value), digits) + 0.0 for value in (values.min(), values.max()))
            std = column.std if low < high else 0.0
            said = f"min {low:.4g}, mean {column.mean:.4g}, max {high:.4g}, std {std:.4g}"
            table.append((column.name, "number", f"{missing:.1%}", said))
            number_place += 1
        else:
            counts = torch.bincount(categories[:, category_place], minlength=column.size) / len(chosen)
            places = counts[1 : 1 + len(column.values)]
            best = int(places.argmax())
            said = f"{len(column.values):,} categories, most often {column.values[best]!r} ({float(places[best]):.1%})"
            missing = float(counts[-1]) if column.missing else 0.0
            table.append((column.name, "category", f"{missing:.1%}", said))
            category_place += 1
    widths = [max(len(line[part]) for line in table) for part in range(3)]
    return [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  missing {missing:>{widths[2]}}  {said}"
        for name, kind, missing, said in table
    ]


def draw_batch(data: DataModule, slot: Slot, path: Path) -> None:
    """Save a grid of up to 64 images of a batch, with any labels, as they enter the network but for the colours."""
    images_BCHW = slot.batch["inputs"][: min(slot.count, 64)].float().cpu()
    if data.normalization is not None:
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (data.normalization.mean, data.normalization.std)
        )
        images_BCHW = images_BCHW * std + mean
    pixels_BHWC = (images_BCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels_BHWC.shape[1:3]
    enlarge = max(1, CELL // max(height, width))
    above = 18 if data.class_names else 4  # room for a label
    cell_width, cell_height = max(width * enlarge, CELL) + 8, height * enlarge + above + 2
    grid = Image.new("RGB", (COLUMNS * cell_width, -(-len(pixels_BHWC) // COLUMNS) * cell_height), "white")
    pen = ImageDraw.Draw(grid)
    for position, pixels_HWC in enumerate(pixels_BHWC):
        left, top = position % COLUMNS * cell_width + 4, position // COLUMNS * cell_height
        image = Image.fromarray(pixels_HWC.squeeze(-1) if pixels_HWC.shape[-1] == 1 else pixels_HWC)
        if data.class_names:
            label = data.class_names[int(slot.batch["labels"][position])]
            pen.text((left, top + 4), label[: cell_width // 7], fill="black")
        grid.paste(image.resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST), (left, top + above))
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
