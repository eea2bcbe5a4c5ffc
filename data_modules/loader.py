"""From a split to batches on the device, in the order of the sampler, with or without loader processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from data_modules.augmentation import Augmentation, mix
from data_modules.sampler import BatchPlan, BatchSampler, evaluation_shares
from data_modules.splits import Batch, DataModule, GlobalBatch, Slot, Split

AT_ONCE, AT_ONCE_BYTES = 512, 4 << 20  # samples that are gathered and normalised together, unless a batch is larger
ALIGNMENT = 64  # bytes, of the memory that torch hands out


class _Gathering(Dataset[Batch]):
    """Makes a loader process gather many samples for one index."""

    def __init__(self, gather: Callable[[torch.Tensor], Batch], parts: Sequence[torch.Tensor]) -> None:
        self.gather = gather
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, position: int) -> Batch:
        return self.gather(self.parts[position])


def _gather_all(
    gather: Callable[[torch.Tensor], Batch], parts: Iterable[torch.Tensor], num_workers: int
) -> Iterator[Batch]:
    """Yield the samples of each part, in order."""
    if not num_workers:
        return (gather(part) for part in parts)
    # Without a generator of its own, an iterator draws from the global one and shifts the run's randomness.
    generator = torch.Generator().manual_seed(0)
    gathering = _Gathering(gather, list(parts))
    return iter(DataLoader(gathering, batch_size=None, num_workers=num_workers, generator=generator))


def _ahead(
    batches: Iterator[tuple[list[BatchPlan], Batch]], device: torch.device
) -> Iterator[tuple[list[BatchPlan], Batch]]:
    """Yield batches; on a GPU the next one is copied and normalised beside the computation of the one before."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def fetch() -> tuple[list[BatchPlan], Batch] | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    following = fetch()
    while following is not None:
        present = following
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side)
        for tensor in present[1].values():
            tensor.record_stream(computing)  # its memory is not given away before the computation is over
        following = fetch()
        yield present


def _cut(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return a part, aligned in memory as if it were alone: elsewhere a model may compute other last bits."""
    part = tensor[first:last]
    return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()


def _indices(group: list[BatchPlan]) -> torch.Tensor:
    return torch.cat([slot.indices for plan in group for slot in plan.slots])


def _gather_with_partners(
    split: Split, augmentation: Augmentation, epoch: int, seed: int, indices: torch.Tensor
) -> Batch:
    partners = split.gather(augmentation.partners(indices, epoch, seed, len(split)))
    return split.gather(indices) | {f"partner_{name}": value for name, value in partners.items()}


@dataclass(frozen=True)
class TrainingLoader:
    """Batches of the training split for one process."""

    data: DataModule
    sampler: BatchSampler
    device: torch.device
    num_workers: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0  # of the augmentation
    first_index: int = 0  # number of the split's first sample, where it is a block of a stream

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
        plans = self.sampler.batches(epoch, start)
        groups: Iterable[list[BatchPlan]] = iter(lambda: list(islice(plans, self._batches_at_once())), [])
        if self.num_workers:
            groups = list(groups)
            gathered = _gather_all(self._gather(epoch), map(_indices, groups), self.num_workers)
        else:
            gathered = None
        for group, batch in _ahead(self._finished(groups, gathered, epoch), self.device):
            position = 0
            for plan in group:
                ready = []
                for slot in plan.slots:
                    following = position + len(slot.indices)
                    part = {name: _cut(tensor, position, following) for name, tensor in batch.items()}
                    ready.append(Slot(slot.number, slot.count, part))
                    position = following
                yield GlobalBatch(plan.size, ready)

    def load(self, indices: torch.Tensor, epoch: int) -> Batch:
        """Return samples of the split at int64 `indices` [B], as they enter the network in that epoch."""
        return self._finish(self._gather(epoch)(indices), indices, epoch)

    def _finished(
        self, groups: Iterable[list[BatchPlan]], gathered: Iterator[Batch] | None, epoch: int
    ) -> Iterator[tuple[list[BatchPlan], Batch]]:
        for group in groups:
            indices = _indices(group)
            batch = self._gather(epoch)(indices) if gathered is None else next(gathered)
            yield group, self._finish(batch, indices, epoch)

    def _batches_at_once(self) -> int:
        """Return how many batches are gathered together, to share the cost of a call; texts differ in length."""
        shape = self.data.inputs.shape
        samples = -(-self.batch_size // self.sampler.num_processes)  # of one process
        return max(1, min(AT_ONCE, AT_ONCE_BYTES // (4 * max(1, math.prod(shape)))) // samples) if shape else 1

    def _gather(self, epoch: int) -> Callable[[torch.Tensor], Batch]:
        """Return what gathers samples, and the samples to mix them with."""
        if not self.augmentation.mixup:
            return self.data.train.gather
        return partial(_gather_with_partners, self.data.train, self.augmentation, epoch, self.seed)

    def _finish(self, batch: Batch, indices: torch.Tensor, epoch: int) -> Batch:
        """Move a batch to the device, augment and normalise it there."""
        if not self.augmentation:
            return self.data.prepare(batch, self.device)
        augmentation, seed = self.augmentation, self.seed
        batch = self.data.move(batch, self.device)
        drawn_by = {"inputs": indices}  # the numbers of the samples decide what is drawn
        if augmentation.mixup:
            drawn_by["partner_inputs"] = augmentation.partners(indices, epoch, seed, len(self.data.train))
        for name, numbers in drawn_by.items():
            numbers = (numbers + self.first_index).to(self.device)
            images = self.data.normalize(augmentation.pixels(batch[name], numbers, epoch, seed))
            batch[name] = augmentation.cut(images, numbers, epoch, seed)
        if augmentation.mixup:
            batch["weights"] = augmentation.mix_weights((indices + self.first_index).to(self.device), epoch, seed)
            batch["inputs"] = mix(batch["inputs"], batch.pop("partner_inputs"), batch["weights"])
        return batch


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
        parts = [share.indices for share in shares]
        for share, batch in zip(shares, _gather_all(self.split.gather, parts, self.num_workers)):
            yield Slot(share.number, share.count, self.data.prepare(batch, self.device))
