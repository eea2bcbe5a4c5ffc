"""What a split is: samples in memory that are gathered by index. Legend: B batch, C channels, H height, W width."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from data_modules.decoding import EncodedImages

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Normalization:
    """Per-channel standardisation of images; `scale` maps stored values to [0, 1] first."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, inputs_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 images with mean 0 and std 1 per channel, over the split that was measured."""
        # One multiplication and one addition: (x * scale - mean) / std.
        factor = torch.tensor([self.scale / std for std in self.std], device=inputs_BCHW.device)
        shift = torch.tensor([-mean / std for mean, std in zip(self.mean, self.std)], device=inputs_BCHW.device)
        return torch.addcmul(shift[:, None, None], inputs_BCHW.float(), factor[:, None, None])


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
    """Samples with labels.

    `inputs` are uint8 images [N, C, H, W] or float32 features [N, D]; `labels` are class numbers, int64 [N].
    """

    inputs: torch.Tensor | EncodedImages
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the samples at `indices` as stored."""
        return {"inputs": self.inputs[indices], "labels": self.labels[indices]}


@dataclass(frozen=True)
class DataModule:
    """The splits of a data set, and all that is needed to treat a new sample the same way."""

    name: str
    fingerprint: str  # checksum of the training and validation samples and labels, in their order
    train: Split
    validation: Split
    test: Split | None
    class_names: list[str]
    normalization: Normalization | None
    notes: list[str] = field(default_factory=list)  # what was decided on the user's behalf

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (D,)."""
        return tuple(self.train.inputs.shape[1:])

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """Move a gathered batch to the device and normalise it there."""
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if self.normalization is not None:
            batch["inputs"] = self.normalization.apply(batch["inputs"])
        return batch

    def describe(self) -> dict[str, Any]:
        """Return what a run must remember of its data, as plain values."""
        normalization = self.normalization
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "input_shape": list(self.input_shape),
            "class_names": self.class_names,
            "normalization": None if normalization is None else vars(normalization),
            "samples": {name: len(split) for name, split in self.splits().items()},
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


def measure_normalization(split: Split, scale: float) -> Normalization:
    """Measure mean and standard deviation per channel of uint8 images, exactly, from their histograms.

    Up to 500 million pixels are read; of larger splits, images at equal distances. A constant channel gets the
    standard deviation 1.
    """
    num_samples, channels, height, width = split.inputs.shape
    most = max(1, 500_000_000 // (channels * height * width))
    chosen = torch.arange(0, num_samples, -(-num_samples // most))
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for part in chosen.split(1024):
        images_BCHW = split.inputs[part]
        for channel in range(channels):
            counts[channel] += torch.bincount(images_BCHW[:, channel].flatten(), minlength=256)
    levels = torch.arange(256) * scale
    shares = counts / counts.sum(dim=1, keepdim=True)
    mean = shares @ levels.double()
    std = (shares * (levels.double() - mean[:, None]) ** 2).sum(dim=1).sqrt()
    return Normalization(scale, tuple(mean.tolist()), tuple(value or 1.0 for value in std.tolist()))
