"""Whether batches, processes and loader processes get different samples, and epochs different changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from train.engine.checks.finding import Finding, judge, skip
from train.engine.checks.reading import Hashes, hash_rows, inputs_of, list_numbers, load_some, on_main
from train.engine.checks.subject import Subject
from train.engine.errors import TrainingError

SLOT_SHARED = 0.5  # share of a slot's samples that are in another one, too
LOOKED_AT = 1024  # samples of the loader that a loader process yields before the next one's turn, and a few more


@dataclass
class _Reading:
    """What a process read of the loader: for each real sample its batch, its slot and its hash."""

    batches: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    hashes: list[Hashes] = field(default_factory=list)

    def rows(self) -> torch.Tensor:
        """Return batch, slot and hash of each sample, int64 [samples, 3]."""
        lengths = [len(part) for part in self.hashes]
        places = np.repeat(np.array([self.batches, self.slots], dtype=np.int64).reshape(2, -1), lengths, axis=1)
        hashes = np.concatenate([*self.hashes, np.zeros(0, dtype=np.uint64)]).view(np.int64)
        return torch.from_numpy(np.concatenate([places, hashes[None]]).T.copy())


def check_batches(subject: Subject) -> Iterator[Finding]:
    """See that no two slots, batches or processes get the same samples, and that reading again yields the same."""
    settings, runtime = subject.settings, subject.runtime
    thorough = settings.preflight == "full"
    if settings.num_workers and not thorough:
        yield skip("batches", "starting loader processes takes seconds: --preflight looks at them")
        return
    mine, repeats, error = torch.zeros(0, 3, dtype=torch.int64), True, None
    try:
        mine = _read_batches(subject)
        repeats = not thorough or torch.equal(mine, _read_batches(subject))
    except Exception as problem:  # one process must not leave the others waiting; raised again below
        error = problem
    states = torch.stack(runtime.gather(torch.tensor([len(mine), repeats, error is None])))
    if error is not None:
        raise error
    if not states[:, 2].all():
        raise TrainingError(f"process {int(states[:, 2].argmin())} cannot read its batches")
    padded = torch.zeros(int(states[:, 0].max()), 3, dtype=torch.int64)
    padded[: len(mine)] = mine
    everyone = [rows[: int(count)] for rows, count in zip(runtime.gather(padded), states[:, 0])]
    unstable = [rank for rank, same in enumerate(states[:, 1].tolist()) if not same]
    yield from on_main(subject, lambda: [_judge_batches(subject, everyone, unstable)])


def _read_batches(subject: Subject) -> torch.Tensor:
    """Return batch, slot and hash of each sample of this process in the first batches, int64 [samples, 3]."""
    settings, reading = subject.settings, _Reading()
    fewest, samples = 2, 0
    if settings.preflight == "full" and settings.num_workers:
        fewest = 2 + 2 * settings.num_workers
        samples = LOOKED_AT * settings.num_workers  # a loader process may prepare several small batches at once
    batches, seen = subject.loader.batches(0, 0), 0
    try:
        for place, batch in enumerate(batches):
            for slot in batch.slots:
                reading.batches.append(place)
                reading.slots.append(slot.number)
                reading.hashes.append(hash_rows(inputs_of(subject, slot.batch))[: slot.count])
            seen += batch.size // subject.runtime.num_processes
            if place + 1 >= fewest and seen >= samples:
                break
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()  # and with it the loader processes
    return reading.rows()


def _judge_batches(subject: Subject, everyone: Sequence[torch.Tensor], unstable: list[int]) -> Finding:
    units: dict[tuple[int, int, int], np.ndarray[Any, Any]] = {}
    for rank, rows in enumerate(everyone):
        places = rows[:, :2].unique(dim=0).tolist()
        units |= {(rank, *place): rows[(rows[:, :2] == torch.tensor(place)).all(dim=1), 2].numpy() for place in places}
    if unstable:
        return judge(
            "batches",
            False,
            f"read again, other samples came on process {list_numbers(unstable)}",
            "the same batches each time",
            ("the loader draws from a generator that moves on, or from the clock: draw by (seed, epoch, sample)",),
            unstable=unstable,
        )
    if len(units) < 2:
        return skip("batches", "there is one only")
    by_nature = max(_share_within(list(units.values())), _share_by_chance(subject, units))
    pair, share = _most_shared(units)
    said = f"{len(units)} slots of {1 + max(batch for _, batch, _ in units)} batches on {len(everyone)} process(es)"
    if by_nature >= SLOT_SHARED:
        return skip("batches", f"{said}: {by_nature:.0%} of samples occur twice by nature, so nothing can be told")
    said += f", {share:.0%} of a slot's samples in another one at most"
    ok = share <= SLOT_SHARED + by_nature
    if not ok:
        said += f": {_name_unit(pair[0])} and {_name_unit(pair[1])}"
    return judge(
        "batches",
        ok,
        said,
        "other samples in each" + (f", but for {by_nature:.0%} that occur twice by nature" if by_nature else ""),
        (_explain_sharing(pair),),
        slots=len(units),
        shared=share,
        by_nature=by_nature,
        pair=[list(unit) for unit in pair],
    )


def _name_unit(unit: tuple[int, int, int]) -> str:
    return f"slot {unit[2]} of batch {unit[1]} on process {unit[0]}"


def _explain_sharing(pair: tuple[tuple[int, int, int], tuple[int, int, int]]) -> str:
    (first_rank, first_batch, _), (rank, batch, _) = pair
    if first_rank != rank:
        return "processes do not share the batch: give the sampler rank and num_processes of the run"
    if first_batch != batch:
        return (
            "the loader does not move on, or its loader processes have one seed: take samples by a permutation of "
            "(seed, epoch), cut at the position"
        )
    return "forward passes of one step take the same samples: cut the batch into slots"


def _share_within(units: Sequence[np.ndarray[Any, Any]]) -> float:
    """Return the share of all slots' samples that came in their slot before."""
    return 1 - sum(len(np.unique(hashes)) for hashes in units) / sum(len(hashes) for hashes in units)


def _share_by_chance(subject: Subject, units: Mapping[tuple[int, int, int], np.ndarray[Any, Any]]) -> float:
    """Return how much slots share that are filled with other training samples each, of up to 512 in all.

    In large slots of data that repeat themselves samples occur twice within a slot; in small ones only this shows it.
    """
    lengths, total = [], 0
    for hashes in units.values():
        length = min(len(hashes), 64)
        if total + length > min(512, len(subject.task.splits["train"])):
            break
        lengths.append(length)
        total += length
    if len(lengths) < 2:
        return 0.0
    numbers = subject.numbers("train", total)
    hashes = hash_rows(inputs_of(subject, subject.task.splits["train"].gather(numbers)))
    parts = np.split(hashes, np.cumsum(lengths)[:-1])
    return _most_shared({(0, 0, place): part for place, part in enumerate(parts)})[1]


def _most_shared(
    units: Mapping[tuple[int, int, int], np.ndarray[Any, Any]],
) -> tuple[tuple[tuple[int, int, int], tuple[int, int, int]], float]:
    """Return the two slots that share most, and the share of the smaller one's samples."""
    holders: dict[int, dict[tuple[int, int, int], int]] = defaultdict(dict)
    for unit, hashes in units.items():
        for value, count in zip(*np.unique(hashes, return_counts=True)):
            holders[int(value)][unit] = int(count)
    shared: dict[tuple[tuple[int, int, int], tuple[int, int, int]], int] = defaultdict(int)
    for counts in holders.values():
        for pair in combinations(counts, 2):
            shared[pair] += min(counts[pair[0]], counts[pair[1]])
    first, second = list(units)[:2]
    shares = {pair: count / min(len(units[pair[0]]), len(units[pair[1]])) for pair, count in shared.items()}
    pair = max(shares, key=lambda pair: shares[pair], default=(first, second))
    return pair, shares.get(pair, 0.0)


def check_augmentation(subject: Subject) -> Iterator[Finding]:
    """See that augmentation changes from epoch to epoch, and is the same when an epoch is asked for again."""
    if subject.task.augmented:
        yield from on_main(subject, lambda: [_judge_augmentation(subject)])


def _judge_augmentation(subject: Subject) -> Finding:
    plain, first, second, again = (hash_rows(load_some(subject, 16, epoch)) for epoch in (None, 0, 1, 0))
    count = len(first)
    changed, moved, unlike = (int((other != first).sum()) for other in (plain, second, again))
    said = [f"{changed} of {count} samples are changed, {moved} otherwise in the next epoch"]
    causes = []
    if unlike:
        said.append(f"{unlike} came out otherwise when asked for again")
        causes.append(
            "it draws from a generator that moves on, or from the clock, and no run could be resumed exactly: draw by "
            "(seed, epoch, sample)"
        )
    if not moved:
        causes.append("it draws the same in every epoch: let the epoch enter the seed")
    return judge(
        "augmentation",
        not causes,
        "; ".join(said),
        "other changes in each epoch, the same ones when an epoch is asked for again",
        tuple(causes),
        samples=count,
        changed=changed,
        changed_in_next_epoch=moved,
        changed_again=unlike,
    )
