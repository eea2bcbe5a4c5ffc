"""A training split that is read as a stream, in blocks, and never held as a whole.

Block b is the same rows in every epoch, shuffled by (seed, epoch, b). All processes read all blocks and take their
slots from them, so that samples and their order do not depend on the number of processes. Where a block begins in
the stream is kept in the checkpoint: resuming reads one block, not all that came before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from data_modules.augmentation import Augmentation
from data_modules.decoding import BadRowError
from data_modules.errors import DataError
from data_modules.loader import TrainingLoader
from data_modules.rows import Rows
from data_modules.sampler import BatchSampler
from data_modules.splits import Batch, DataModule, GlobalBatch, Split

if TYPE_CHECKING:
    import datasets

BLOCK = 10_000  # samples, about; shuffling reaches no further


@dataclass(frozen=True)
class Stream:
    """The rows of a split, to be read in order, and what makes samples of them."""

    rows: Rows  # of a datasets.IterableDataset
    num_samples: int
    encode: Callable[[Rows], Split]  # rejects rows that cannot be used

    def blocks(self, size: int, first: int, place: dict[str, Any] | None) -> Iterator[tuple[Split, dict[str, Any]]]:
        """Yield the blocks of `size` rows from number `first` on, each with its place in the stream.

        A row that cannot be used, where such rows are skipped, has a good one of its block in its place: the number of
        samples stays what it is.

        Args:
            size: rows of a block; the last may be shorter.
            first: number of the first block that is wanted.
            place: what came with a block before, if any; reading begins there where that saves time.

        Raises:
            DataError: the stream has not as many rows as it should, or a row cannot be used.
        """
        tables = self.rows.data.with_format("arrow")
        number = 0
        if place is not None and place["size"] == size and place["block"] <= first:
            number = place["block"]
            if place["state"] is not None:
                tables.load_state_dict(place["state"])
        state = None if number == 0 else place["state"]  # type: ignore[index]
        count = number * size
        for table in tables.iter(batch_size=size):
            following = tables.state_dict()
            count += len(table)
            if number >= first:
                rows = dataclasses.replace(self.rows, data=self._hold(table), where=self._where(number * size), bad={})
                yield self._fill(self.encode(rows), rows), {"size": size, "block": number, "state": state}
            state = following
            number += 1
        if count != self.num_samples:
            raise DataError(
                f"the stream of split {self.rows.name!r} has {count:,} rows, not {self.num_samples:,} as at the start"
            )

    def _hold(self, table: Any) -> datasets.Dataset:
        import datasets

        return datasets.Dataset(table, info=datasets.DatasetInfo(features=self.rows.data.features))

    def _where(self, first: int) -> Callable[[int], str]:
        return lambda row: self.rows.where(first + row)

    def _fill(self, split: Split, rows: Rows) -> Split:
        chosen = torch.arange(len(rows))
        if rows.bad:
            good = rows.good()
            if not len(good):
                raise DataError(f"{next(iter(rows.bad.values()))}; and so are all {len(rows):,} rows of the block")
            bad = torch.tensor(sorted(rows.bad))
            chosen[bad] = good[bad % len(good)]
        return _Block(split.samples, split.labels[chosen], chosen, rows.skip_bad)


@dataclass(frozen=True)
class _Block(Split):
    """A block, in which an image that cannot be decoded when its turn comes is replaced by the next one."""

    skip_bad: bool = False

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the samples at int64 `indices` [B], as they are stored, with their labels."""
        assert self.rows is not None
        for _ in range(len(self)):
            try:
                return super().gather(indices)
            except BadRowError as error:
                if not self.skip_bad:
                    raise
                indices = torch.where(self.rows[indices] == error.row, (indices + 1) % len(self), indices)
        raise DataError("no image of this block of the stream can be decoded")


@dataclass(frozen=True)
class StreamLoader:
    """Batches of a streamed training split for one process."""

    data: DataModule
    order: Callable[[Split], Callable[[int], torch.Tensor]]  # of the samples of a block, for each epoch
    batch_size: int
    num_slots: int
    rank: int
    num_processes: int
    device: torch.device
    num_workers: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    place: dict[str, Any] | None = None  # where the checkpoint says a block begins
    remember: Callable[[dict[str, Any]], None] = lambda place: None  # is told where the current block begins

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, over all processes."""
        assert self.data.stream is not None
        return self.data.stream.num_samples

    def batches(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        """Yield the batches of an epoch from sample number `start` on."""
        assert self.data.stream is not None
        size = max(1, BLOCK // self.batch_size) * self.batch_size  # so that no batch lies in two blocks
        first = start // size
        for number, (split, place) in enumerate(self.data.stream.blocks(size, first, self.place), first):
            self.remember(place)
            block = self._block(split, number, number * size)
            yield from block.batches(epoch, start - first * size if number == first else 0)

    def load(self, indices: torch.Tensor, epoch: int) -> Batch:
        """Return samples of the stream's beginning at int64 `indices` [B], as they enter the network in that epoch."""
        return self._block(self.data.train, 0, 0).load(indices, epoch)

    def _block(self, split: Split, number: int, first_index: int) -> TrainingLoader:
        sampler = BatchSampler(
            order=partial(_order_block, self.order(split), number),
            num_samples=len(split),
            batch_size=self.batch_size,
            num_slots=self.num_slots,
            rank=self.rank,
            num_processes=self.num_processes,
        )
        return TrainingLoader(
            data=dataclasses.replace(self.data, train=split),
            sampler=sampler,
            device=self.device,
            num_workers=self.num_workers,
            augmentation=self.augmentation,
            seed=self.seed,
            first_index=first_index,
        )


def _order_block(order: Callable[[int], torch.Tensor], number: int, epoch: int) -> torch.Tensor:
    return order(epoch * 1_000_003 + number)  # torch's generator looks at the low 32 bits of a seed only (torch 2.13)


def hold(rows: Rows, most: int | None = None) -> Rows:
    """Read the first rows of a stream, or all, into memory."""
    import datasets

    data = rows.data if most is None else rows.data.take(most)
    tables = list(data.with_format("arrow").iter(batch_size=1000))
    features = rows.data.features
    if not tables:
        return dataclasses.replace(rows, data=datasets.Dataset.from_dict({name: [] for name in features or {}}))
    import pyarrow as pa

    table = pa.concat_tables(tables)
    return dataclasses.replace(rows, data=datasets.Dataset(table, info=datasets.DatasetInfo(features=features)), bad={})


def count_rows(rows: Rows) -> int:
    """Return the number of rows of a stream, as its description has it, or else by reading it once."""
    told = (rows.data.info.splits or {}).get(rows.name)
    if told is not None and told.num_examples:
        return int(told.num_examples)
    return sum(len(table) for table in rows.data.with_format("arrow").iter(batch_size=10_000))
