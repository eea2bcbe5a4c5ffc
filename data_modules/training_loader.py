"""The batches of a training split: held or streamed, in plain, balanced or bucketed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from data_modules.augmentation import Augmentation
from data_modules.loader import TrainingLoader
from data_modules.orders import balanced_order, bucketed_order
from data_modules.sampler import BatchSampler, epoch_order
from data_modules.splits import DataModule, Split
from data_modules.stream import StreamLoader


def build_training_loader(
    data: DataModule,
    *,
    batch_size: int,
    num_slots: int,
    rank: int,
    num_processes: int,
    device: torch.device,
    num_workers: int,
    seed: int,
    augmentation: Augmentation,
    balanced: bool,
    place: dict[str, Any] | None,
    remember: Callable[[dict[str, Any]], None],
) -> TrainingLoader | StreamLoader:
    """Return the batches of the training split for one process.

    Args:
        data: what to train on.
        batch_size: samples of a global batch.
        num_slots: parts of a global batch; a multiple of `num_processes`.
        rank: of this process.
        num_processes: that share each batch.
        device: where batches go.
        num_workers: processes that load samples.
        seed: of order and augmentation.
        augmentation: random changes of images.
        balanced: draw every class equally often.
        place: where the checkpoint says that a stream's current block begins.
        remember: is told where it begins from now on.
    """

    def order(split: Split) -> Callable[[int], torch.Tensor]:
        if balanced:
            return lambda epoch: balanced_order(seed, epoch, split.labels)
        if data.inputs.task == "text":  # texts of like length in a batch leave little to pad
            lengths = split.lengths()
            return lambda epoch: bucketed_order(seed, epoch, lengths, batch_size)
        return lambda epoch: epoch_order(seed, epoch, len(split))

    if data.stream is not None:
        return StreamLoader(
            data,
            order,
            batch_size,
            num_slots,
            rank,
            num_processes,
            device,
            num_workers,
            augmentation,
            seed,
            place,
            remember,
        )
    sampler = BatchSampler(order(data.train), len(data.train), batch_size, num_slots, rank, num_processes)
    return TrainingLoader(data, sampler, device, num_workers, augmentation, seed)
