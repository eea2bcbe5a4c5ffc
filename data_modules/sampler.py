"""Which samples make up which batch: a pure function of (order, position), never of the number of processes.

A global batch is cut into `num_slots` slots, a slot being what one process takes in one forward pass. Process p of P
takes the slots [p * V/P, (p + 1) * V/P), so that any P that divides V sees the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


def epoch_order(seed: int, epoch: int, num_samples: int) -> torch.Tensor:
    """Return the order of samples of one epoch: a permutation of 0..num_samples-1, int64 of shape [num_samples]."""
    generator = torch.Generator()
    # A large odd multiplier keeps (seed, epoch) pairs apart; any other pair gives another stream.
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + epoch + 1) % 2**63)
    return torch.randperm(num_samples, generator=generator)


@dataclass(frozen=True)
class SlotIndices:
    """The samples of one slot.

    `count` of the `indices` are real; a slot of a short last batch that got none holds one filler sample and count 0,
    so that every process takes part in every forward pass.
    """

    number: int
    indices: torch.Tensor
    count: int


@dataclass(frozen=True)
class BatchPlan:
    """This process's share of one global batch of `size` samples."""

    size: int
    slots: list[SlotIndices]


@dataclass(frozen=True)
class BatchSampler:
    """Cuts the epochs of a split into global batches and slots for one process.

    The last batch of an epoch is as short as it must be: every sample appears exactly once an epoch.
    """

    order: Callable[[int], torch.Tensor]  # the samples of an epoch in their order, int64 [num_samples]
    num_samples: int
    batch_size: int
    num_slots: int
    rank: int
    num_processes: int

    def batches(self, epoch: int, start: int) -> Iterator[BatchPlan]:
        """Yield the batches of an epoch from sample number `start` on, at the same cost for any `start`."""
        order = self.order(epoch)
        for first in range(start, self.num_samples, self.batch_size):
            batch = order[first : first + self.batch_size]
            yield BatchPlan(len(batch), self._share(batch))

    def _share(self, batch: torch.Tensor) -> list[SlotIndices]:
        per_process = self.num_slots // self.num_processes
        size = len(batch)
        slots = []
        for number in range(self.rank * per_process, (self.rank + 1) * per_process):
            # Rounded up, so that slot 0 never is a filler: batch norm's averages are taken from it.
            first, last = -(-size * number // self.num_slots), -(-size * (number + 1) // self.num_slots)
            indices = batch[first:last] if last > first else batch[:1]
            slots.append(SlotIndices(number, indices, last - first))
        return slots


def evaluation_shares(num_samples: int, batch_size: int, rank: int, num_processes: int) -> list[SlotIndices]:
    """Cut a split into this process's evaluation batches of at most `batch_size` samples.

    Every sample is counted on exactly one process. All processes get the same number of batches, because the forward
    pass of a sharded model is collective; a process that runs short gets fillers with count 0.
    """
    first, last = num_samples * rank // num_processes, num_samples * (rank + 1) // num_processes
    largest = -(-num_samples // num_processes)
    shares = []
    for number, offset in enumerate(range(0, largest, batch_size)):
        indices = torch.arange(min(first + offset, last), min(first + offset + batch_size, last))
        count = len(indices)
        shares.append(SlotIndices(number, indices if count else torch.zeros(1, dtype=torch.int64), count))
    return shares
