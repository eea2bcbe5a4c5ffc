"""What the engine expects of data modules and scripts; it knows no data set and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
# What a script says of a batch: per-sample values of shape [B] by metric name; "loss" is what training lowers.
Measure = Callable[[nn.Module, Batch], dict[str, torch.Tensor]]
Score = Callable[[nn.Module], dict[str, float]]  # the mean of each metric over a split


class Slot(Protocol):
    """Part of a batch; the first `count` rows are real samples, the others fillers."""

    @property
    def number(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def batch(self) -> Any: ...


class Watcher(Protocol):
    """Sees an evaluation pass by, and draws when it is over. All processes call its methods together."""

    def watch(self, slot: Slot, values: dict[str, torch.Tensor]) -> None:
        """Look at what was measured of a slot, and take out what has no mean."""
        ...

    def draw(self, model: nn.Module) -> None:
        """Draw; the evaluation is over."""
        ...


class GlobalBatch(Protocol):
    """This process's slots of one global batch of `size` samples."""

    @property
    def size(self) -> int: ...

    @property
    def slots(self) -> Sequence[Slot]: ...


class Loader(Protocol):
    """Batches of the training split, in an order that depends on the epoch only."""

    @property
    def num_samples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield the global batches of an epoch from sample number `start` on."""
        ...


class Split(Protocol):
    """Samples that are gathered by number, as they are stored."""

    def __len__(self) -> int: ...

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the samples at int64 `indices` [B]."""
        ...


@dataclass(frozen=True)
class Task:
    """What preflight must know of a task, from its script."""

    splits: Mapping[str, Split]  # "train", of a stream its beginning, and "validation"
    load: Callable[[str, torch.Tensor, int | None], Batch]
    """Returns samples of a split by number, as the network sees them, on the device: augmented as in that epoch, or
    plain for None."""
    predict: Callable[[nn.Module, Batch], torch.Tensor]  # what the model answers, [B, ...]
    inputs: tuple[str, ...]  # the tensors of a batch that enter the model
    targets: tuple[str, ...]  # those that only the loss may see; none where the input is the target
    untrained_loss: Callable[[Batch], float]  # what theory says of the mean loss of an untrained model
    constant_loss: Callable[[Batch], float]
    """Returns the least mean loss of an answer that is the same for all samples; needs nothing but their targets."""
    num_classes: int | None = None  # of outputs [B, num_classes] and labels; None: no classification
    augmented: bool = False  # training samples are changed at random
    # When a few samples count as learned by heart: the share of the first loss that is left, after how many steps of
    # Adam at most, and the metrics that are perfect then.
    overfit_share: float = 0.05
    overfit_steps: int = 1000
    overfit_metrics: Mapping[str, float] = field(default_factory=dict)
