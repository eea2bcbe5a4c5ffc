"""What the engine expects of data modules and scripts; it knows no data set and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
# What a script says of a batch: per-sample values of shape [B] by metric name; "loss" is what training lowers.
Measure = Callable[[nn.Module, Batch], dict[str, torch.Tensor]]


class Slot(Protocol):
    """Part of a batch; the first `count` rows are real samples, the others fillers."""

    @property
    def number(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def batch(self) -> Any: ...


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
