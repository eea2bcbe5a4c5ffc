"""Data sets that need no network: handwritten digits (real scans, shipped with scikit-learn) and Gaussian blobs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from data_modules.splits import (
    Arrays,
    DataModule,
    InputSpec,
    Split,
    fingerprint_tensors,
    measure_moments,
    measure_normalization,
    scale_only,
)
from data_modules.stratify import stratified_parts

SPLIT_SEED = 0  # the cut is part of the data: the same for every seed of a run


def load_digits(*, labelled: bool = True) -> DataModule:
    """Load 1,797 scans of handwritten digits, 8 x 8 pixels in 17 grey levels, cut 70/15/15 with equal class shares.

    Without labels the parts are the same, there are no classes, and pixels are normalised to [0, 1].

    Source: UCI "Optical Recognition of Handwritten Digits" as shipped by scikit-learn.
    """
    # The file that scikit-learn's loader reads; to import the loader takes longer than to train for some epochs.
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr,misc]
    table = np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), delimiter=",", dtype=np.uint8)
    images_BCHW = torch.from_numpy(table[:, :64].reshape(-1, 1, 8, 8).copy())
    labels = torch.from_numpy(table[:, 64].astype(np.int64))
    parts = stratified_parts(labels, (0.70, 0.15, 0.15), SPLIT_SEED)
    moments_NC2 = measure_moments(images_BCHW[parts[0]].numpy())
    normalization = measure_normalization(torch.from_numpy(moments_NC2), pixels=64, scale=1 / 16)
    if not labelled:
        labels, normalization = torch.zeros_like(labels), scale_only(1 / 16, channels=1)
    train, validation, test = (Split(Arrays({"inputs": images_BCHW[part]}), labels[part]) for part in parts)
    return DataModule(
        name="digits",
        fingerprint=fingerprint_tensors(images_BCHW, labels, *parts),
        inputs=InputSpec("image", (1, 8, 8)),
        train=train,
        validation=validation,
        test=test,
        class_names=[str(digit) for digit in range(10)] if labelled else [],
        normalization=normalization,
    )


def load_blobs() -> DataModule:
    """Make two Gaussian blobs in the plane, std 1.0, centres (-2.5, 0) and (2.5, 0).

    1,000 points per class to train, 200 to validate and 200 to test, float32 [N, 2].
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)

    def sample(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(2).repeat_interleave(per_class)
        centres = torch.tensor([[-2.5, 0.0], [2.5, 0.0]])
        return centres[labels] + torch.randn(2 * per_class, 2, generator=generator), labels

    train, validation, test = sample(1000), sample(200), sample(200)
    splits = [Split(Arrays({"inputs": points}), labels) for points, labels in (train, validation, test)]
    return DataModule(
        name="blobs",
        fingerprint=fingerprint_tensors(*train, *validation),
        inputs=InputSpec("points", (2,)),
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        class_names=["left", "right"],
    )
