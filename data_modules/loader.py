"""From a split to batches on the device, in the order of the sampler, with or without loader processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from data_modules.sampler import BatchPlan, BatchSampler, SlotIndices, evaluation_shares
from data_modules.splits import Batch, DataModule, GlobalBatch, Slot, Split


class _Gathering(Dataset[Batch]):
    """Makes a loader process gather a whole slot for one index."""

    def __init__(self, split: Split, slots: Sequence[SlotIndices]) -> None:
        self.split = split
        self.slots = slots

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, position: int) -> Batch:
        return self.split.gather(self.slots[position].indices)


def _gather_in_workers(split: Split, slots: Sequence[SlotIndices], num_workers: int) -> Iterator[Batch]:
    # Without a generator of its own, an iterator draws from the global one and shifts the run's randomness.
    generator = torch.Generator().manual_seed(0)
    return iter(DataLoader(_Gathering(split, slots), batch_size=None, num_workers=num_workers, generator=generator))


@dataclass(frozen=True)
class TrainingLoader:
    """Batches of the training split for one process."""

    data: DataModule
    sampler: BatchSampler
    device: torch.device
    num_workers: int = 0

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, over all processes."""
        return self.sampler.num_samples

    @property
    def batch_size(self) -> int:
        """Samples in a full batch, over all processes."""
        return self.sampler.batch_size

    def batches(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        """Yield the batches of an epoch from sample number `start` on."""
        plans: Iterable[BatchPlan] = self.sampler.batches(epoch, start)
        if self.num_workers:
            plans = list(plans)
            slots = [slot for plan in plans for slot in plan.slots]
            loaded = _gather_in_workers(self.data.train, slots, self.num_workers)
        for plan in plans:
            ready = []
            for slot in plan.slots:
                batch = next(loaded) if self.num_workers else self.data.train.gather(slot.indices)
                ready.append(Slot(slot.number, slot.count, self.data.prepare(batch, self.device)))
            yield GlobalBatch(plan.size, ready)


@dataclass(frozen=True)
class EvaluationLoader:
    """Batches of a split for one process; over all processes every sample comes exactly once."""

    data: DataModule
    split: Split
    batch_size: int
    rank: int
    num_processes: int
    device: torch.device
    num_workers: int = 0

    def __iter__(self) -> Iterator[Slot]:
        shares = evaluation_shares(len(self.split), self.batch_size, self.rank, self.num_processes)
        if self.num_workers:
            loaded = _gather_in_workers(self.split, shares, self.num_workers)
        for share in shares:
            batch = next(loaded) if self.num_workers else self.split.gather(share.indices)
            yield Slot(share.number, share.count, self.data.prepare(batch, self.device))
