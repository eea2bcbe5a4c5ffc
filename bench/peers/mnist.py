"""MNIST's Parquet files, as torch alone reads them, and what a peer does to its images."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.cnn import MnistCNN

MEAN, STD = 0.1307, 0.3081


def decode(folder: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised images, float32 [N, 1, 28, 28], and labels, int64 [N], of a split."""
    from PIL import Image
    from pyarrow import parquet

    rows = parquet.read_table(find(folder, split)).to_pydict()
    pixels = np.stack([np.array(Image.open(io.BytesIO(image["bytes"]))) for image in rows["image"]])
    return normalise(torch.from_numpy(pixels)[:, None]), torch.tensor(rows["label"])


def load_rows(folder: str, split: str, name: str) -> Any:
    """Return a split through `datasets`, decoded sample by sample when it is asked for; `name` is the images' key."""
    from datasets import load_dataset

    def transform(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [torch.from_numpy(np.array(image))[None] for image in examples["image"]]
        return {name: [normalise(image) for image in pixels], "labels": examples["label"]}

    rows = load_dataset("parquet", data_files={split: [str(path) for path in find(folder, split)]}, split=split)
    return rows.with_transform(transform)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Return bytes as floats of mean 0 and standard deviation 1."""
    return (pixels.float() / 255 - MEAN) / STD


def find(folder: str, split: str) -> list[Path]:
    """Return the Parquet files of a split."""
    return sorted(Path(folder).glob(f"**/{split}-*.parquet"))


@torch.no_grad()
def score(model: Callable[..., torch.Tensor], batches: Any) -> float:
    """Return the accuracy over batches of images and labels."""
    right = [(model(images).argmax(dim=1) == labels).float() for images, labels in batches]
    return float(torch.cat(right).mean())


def build(seed: int) -> nn.Module:
    """Return the network of all peers, with weights of this seed."""
    torch.manual_seed(seed)
    return MnistCNN()
