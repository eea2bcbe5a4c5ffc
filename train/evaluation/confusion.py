"""The confusion matrix of a run's own test, counted while the test passes by. Legend: K classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from train.engine.contract import Slot
from train.engine.runtime import Runtime
from train.evaluation.pictures import draw_confusion_matrix

MOST_CLASSES = 1000  # of a picture


class ConfusionMatrix:
    """Counts which class is taken for which. All processes call its methods together.

    Args:
        names: of the K classes.
        path: of the picture.
        runtime: of this start.
    """

    def __init__(self, names: Sequence[str], path: Path, runtime: Runtime) -> None:
        self._names = names
        self._path = path
        self._runtime = runtime
        self._counts = torch.zeros(len(names) ** 2, dtype=torch.int64, device=runtime.device)

    def watch(self, slot: Slot, values: dict[str, torch.Tensor]) -> None:
        """Take the predicted classes out of the values, int64 [B], and count."""
        predicted, labels = values.pop("predicted")[: slot.count], slot.batch["labels"][: slot.count]
        self._counts += torch.bincount(labels * len(self._names) + predicted, minlength=len(self._counts))

    def draw(self, model: nn.Module) -> None:
        """Draw what was counted on all processes."""
        counts = self._runtime.sum(self._counts).long().reshape(len(self._names), -1)
        if self._runtime.is_main:
            try:
                draw_confusion_matrix(counts.numpy(), self._names, self._path)
            except OSError as error:  # the run is finished all the same
                self._runtime.say(f"warning: {self._path} cannot be written ({error.strerror})")
