"""What a split is: samples that are gathered by index. Legend: N and B samples, C channels, H height, W width."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash

from data_modules.options import Task

if TYPE_CHECKING:
    from data_modules.stream import Stream

Batch = dict[str, torch.Tensor]

# The tensors of a batch that a model takes, in the order of its arguments.
INPUT_NAMES: dict[Task, tuple[str, ...]] = {
    "image": ("inputs",),
    "points": ("inputs",),
    "text": ("tokens", "lengths"),
    "table": ("numbers", "categories"),
}


class Samples(Protocol):
    """Samples without their labels."""

    def __len__(self) -> int: ...

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the samples at int64 `indices` [B], as they are stored."""
        ...

    def fingerprint(self) -> str:
        """Return a checksum of the samples in their order, the same on every machine."""
        ...


class Preprocessing(Protocol):
    """What turns rows into samples, fitted on the training split; new rows are treated the same way."""

    def encode(self, rows: Any) -> Samples:
        """Return a sample for each of the `Rows`; those that cannot be used are rejected there and hold filler."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the same preprocessing can be made again."""
        ...


@dataclass(frozen=True)
class InputSpec:
    """What a model must know of its inputs."""

    task: Task
    shape: tuple[int, ...] = ()  # image (C, H, W); points (D,); table (number of numeric columns,)
    vocabulary_size: int = 0  # text: token numbers are below it, and 0 is padding
    max_length: int = 0  # text: no batch has more columns of tokens
    category_sizes: tuple[int, ...] = ()  # table: of each categorical column; 0 is "unknown"

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of a batch that a model takes, in the order of its arguments."""
        return INPUT_NAMES[self.task]

    def __str__(self) -> str:
        if self.task == "text":
            return f"text of {self.vocabulary_size:,} different tokens"
        if self.task == "table":
            return f"{self.shape[0]} numbers and {len(self.category_sizes)} categories"
        return f"{self.task} of shape {self.shape}"


@dataclass(frozen=True)
class Arrays:
    """Samples in tensors of equal length, in memory or mapped from a file."""

    tensors: Batch

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the samples at int64 `indices` [B], as they are stored."""
        return {name: tensor.index_select(0, indices) for name, tensor in self.tensors.items()}

    def fingerprint(self) -> str:
        """Return a checksum of names, types, shapes and values."""
        return fingerprint_tensors(*(self.tensors[name] for name in sorted(self.tensors)))


@dataclass(frozen=True)
class Slot:
    """A batch of one slot on the device; the first `count` rows are real samples, the rest fillers."""

    number: int
    count: int
    batch: Batch


@dataclass(frozen=True)
class GlobalBatch:
    """This process's slots of one global batch of `size` samples."""

    size: int
    slots: list[Slot]


@dataclass(frozen=True)
class Split:
    """Samples with labels, or a part of them."""

    samples: Samples
    labels: torch.Tensor  # class numbers of the split, int64 [N]
    rows: torch.Tensor | None = None  # where the split's samples lie in `samples`, int64 [N]; None: all, in order

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the samples at int64 `indices` [B], as they are stored, with their labels."""
        # index_select copies whole rows; indexing by brackets takes 3 times as long (torch 2.13, CPU).
        rows = indices if self.rows is None else self.rows.index_select(0, indices)
        return {**self.samples.gather(rows), "labels": self.labels.index_select(0, indices)}

    def lengths(self) -> torch.Tensor:
        """Return the length of each text in tokens, int64 [N]; for text only."""
        lengths: torch.Tensor = self.samples.lengths  # type: ignore[attr-defined]
        return lengths if self.rows is None else lengths[self.rows]


@dataclass(frozen=True)
class Normalization:
    """Per-channel standardisation of images; `scale` maps stored values to [0, 1] first."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, inputs_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 images with mean 0 and std 1 per channel, over the split that was measured."""
        shift, factor = _constants(self, inputs_BCHW.device)
        # In place on the fresh floats; addcmul with a factor for each channel takes 3 times as long (torch 2.13, CPU).
        return inputs_BCHW.to(torch.float32, copy=True).mul_(factor).add_(shift)


@lru_cache
def _constants(normalization: Normalization, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is added and what is multiplied for each channel, [C, 1, 1]: (x * scale - mean) / std."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (normalization.mean, normalization.std))
    shift, factor = -mean / std, normalization.scale / std
    return shift.float()[:, None, None].to(device), factor.float()[:, None, None].to(device)


@dataclass(frozen=True)
class DataModule:
    """The splits of a data set, and all that is needed to treat a new sample the same way."""

    name: str
    fingerprint: str  # checksum of the training and validation samples and labels, in their order
    inputs: InputSpec
    train: Split
    validation: Split
    test: Split | None
    class_names: list[str]  # none where labels do not matter; the labels are all 0 then
    normalization: Normalization | None = None
    preprocessing: Preprocessing | None = None  # None where samples are taken as they are
    notes: list[str] = field(default_factory=list)  # what was decided on the user's behalf
    skipped: list[str] = field(default_factory=list)  # samples that were left out, and why
    stream: Stream | None = None  # the whole training split, where `train` is only the beginning of a stream

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Move a gathered batch to the device and normalise it there."""
        batch = self.move(batch, device)
        if self.normalization is not None:
            batch["inputs"] = self.normalization.apply(batch["inputs"])
        return batch

    def move(self, batch: Batch, device: torch.device) -> Batch:
        """Copy a gathered batch to the device; from pinned memory to a GPU, so that nobody waits for the copy."""
        if device.type == "cuda":
            return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def normalize(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float images as the network sees them."""
        return images_BCHW.float() if self.normalization is None else self.normalization.apply(images_BCHW)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint must remember of the data, as plain values; the preprocessing is kept beside."""
        normalization = self.normalization
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "inputs": vars(self.inputs),
            "class_names": self.class_names,
            "normalization": None if normalization is None else vars(normalization),
            "samples": {name: len(split) for name, split in self.splits().items()},
        }

    def describe_preprocessing(self) -> dict[str, Any]:
        """Return what it takes to treat a new sample as those of training, as plain values."""
        return {
            "task": self.inputs.task,
            "class_names": self.class_names,
            "normalization": None if self.normalization is None else vars(self.normalization),
            "fitted": None if self.preprocessing is None else self.preprocessing.describe(),
        }

    def splits(self) -> dict[str, Split]:
        """Return the splits that exist, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}


def fingerprint_tensors(*tensors: torch.Tensor) -> str:
    """Return a checksum of the types, shapes and values of tensors."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def measure_moments(images_NCHW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the sums of the pixels and of their squares for each uint8 image and channel, int64 [N, C, 2]."""
    pixels = images_NCHW.reshape(*images_NCHW.shape[:2], -1).astype(np.int64)
    return np.stack([pixels.sum(axis=2), np.einsum("ncp,ncp->nc", pixels, pixels)], axis=2)


def scale_only(scale: float, channels: int) -> Normalization:
    """Return what maps stored values to [0, 1] and leaves them there."""
    return Normalization(scale, (0.0,) * channels, (1.0,) * channels)


def measure_normalization(moments_NC2: torch.Tensor, pixels: int, scale: float) -> Normalization:
    """Return mean and standard deviation per channel, exact but for the last division.

    A constant channel gets the standard deviation 1.

    Args:
        moments_NC2: what `measure_moments` returns of each image.
        pixels: of one channel of an image.
        scale: maps pixels to [0, 1].
    """
    count = len(moments_NC2) * pixels
    sums = moments_NC2.sum(dim=0).tolist()
    # Whole numbers of any size: no bit is lost before the division, whatever the number of pixels.
    mean = tuple(total / count * scale for total, _ in sums)
    std = tuple(math.sqrt(count * squares - total * total) / count * scale for total, squares in sums)
    return Normalization(scale, mean, tuple(value or 1.0 for value in std))
