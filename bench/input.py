"""How fast batches come: this project's warm input path on MNIST, `datasets` with a DataLoader, and a bare gather.

    python bench/input.py --dataset ylecun/mnist --repeats 7

Prints Markdown tables. All ways run in one process, in turn, on the same samples in the same order; a ratio is the
median of the ratios of each round. The way of accelerate's vision example: `with_transform` with a function that
decodes each sample to a normalised tensor, and a DataLoader.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from data_modules.augmentation import Augmentation, parse_augmentation
from data_modules.load import load_data
from data_modules.options import DataOptions
from data_modules.splits import DataModule
from data_modules.training_loader import build_training_loader
from models.cnn import FastCNN, MnistCNN

SECONDS = 2.0  # of one measurement, after the first batch


def our_batches(data: DataModule, batch_size: int, augmentation: Augmentation) -> Iterator[tuple[torch.Tensor, ...]]:
    loader = build_training_loader(
        data,
        batch_size=batch_size,
        num_slots=1,
        rank=0,
        num_processes=1,
        device=torch.device("cpu"),
        num_workers=0,
        seed=0,
        augmentation=augmentation,
        balanced=False,
        place=None,
        remember=lambda place: None,
    )
    epoch = 0
    while True:
        for batch in loader.batches(epoch, 0):
            yield batch.slots[0].batch["inputs"], batch.slots[0].batch["labels"]
        epoch += 1


def bare_batches(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    while True:
        order = torch.randperm(len(labels))
        for indices in order.split(batch_size):
            yield images[indices], labels[indices]


def library_batches(rows, data: DataModule, batch_size: int, workers: int) -> Iterator[tuple[torch.Tensor, ...]]:
    mean, std = data.normalization.mean[0], data.normalization.std[0]

    def transform(examples):
        pixels = [torch.from_numpy(np.array(image))[None] for image in examples["image"]]
        images = [(image.float() / 255 - mean) / std for image in pixels]
        return {"image": images, "label": examples["label"]}

    loader = DataLoader(rows.with_transform(transform), batch_size=batch_size, shuffle=True, num_workers=workers)
    while True:
        for batch in loader:
            yield batch["image"], batch["label"]


def samples_per_second(batches: Iterator[tuple[torch.Tensor, ...]]) -> float:
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        count += len(next(batches)[1])
    return count / (time.perf_counter() - start)


def input_share(model: torch.nn.Module, batches: Iterator[tuple[torch.Tensor, ...]], steps: int) -> float:
    """Return the share of a training step that goes into getting the batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - before
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return waited / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ylecun/mnist", help="a hub id or a folder with MNIST's Parquet files")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    import datasets

    start = time.perf_counter()
    data = load_data(DataOptions(dataset=options.dataset))
    print(f"load_data: {time.perf_counter() - start:.1f} s; {data.notes[-1]}")
    start = time.perf_counter()
    data = load_data(DataOptions(dataset=options.dataset))
    print(f"load_data again: {time.perf_counter() - start:.2f} s\n")
    rows = datasets.load_dataset(options.dataset, split="train").select(data.train.rows.tolist())
    stored = data.train.gather(torch.arange(len(data.train)))
    labels, pixels = stored["labels"], stored["inputs"]
    floats = data.normalization.apply(pixels)
    plain, changed = Augmentation(), parse_augmentation(["crop:2", "rotate:10"])

    print("| batch | way | samples/s, median | least to most | ours is so many times as fast |")
    print("|---|---|---|---|---|")
    for batch_size in (64, 512):
        ways: dict[str, Callable[[], Iterator[tuple[torch.Tensor, ...]]]] = {
            "ours": lambda size=batch_size: our_batches(data, size, plain),
            "bare gather of normalised floats": lambda size=batch_size: bare_batches(floats, labels, size),
            "bare gather of bytes": lambda size=batch_size: bare_batches(pixels, labels, size),
            "`datasets`, DataLoader, 0 workers": lambda size=batch_size: library_batches(rows, data, size, 0),
            "`datasets`, DataLoader, 2 workers": lambda size=batch_size: library_batches(rows, data, size, 2),
            "ours with crop and rotation": lambda size=batch_size: our_batches(data, size, changed),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, start_batches in ways.items():
                speeds[way].append(samples_per_second(start_batches()))
        for way, values in speeds.items():
            ratio = statistics.median(ours / other for ours, other in zip(speeds["ours"], values))
            spread = f"{min(values):,.0f} to {max(values):,.0f}"
            print(f"| {batch_size} | {way} | {statistics.median(values):,.0f} | {spread} | {ratio:.2f} |")

    print("\n| model | batch | share of a training step spent on input, median | least to most |")
    print("|---|---|---|---|")
    for kind in (MnistCNN, FastCNN):
        for batch_size, steps in ((64, 60), (512, 12)):
            shares = [input_share(kind(), our_batches(data, batch_size, plain), steps) for _ in range(options.repeats)]
            shown = f"{min(shares):.2%} to {max(shares):.2%}"
            print(f"| {kind.__name__} | {batch_size} | {statistics.median(shares):.2%} | {shown} |")


if __name__ == "__main__":
    main()
