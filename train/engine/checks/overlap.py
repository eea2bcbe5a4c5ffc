"""The same samples in training and validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from train.engine.checks.finding import Finding, judge, skip
from train.engine.checks.reading import Hashes, Limit, hash_rows, inputs_of, on_main, read
from train.engine.checks.subject import Subject

COPIED = 0.05  # share of validation samples that are training samples, too
FEWEST_COPIES = 3  # less may be chance
OVERLAP = {"quick": Limit(100_000, 2**28, 2), "full": Limit(20_000_000, 2**50, 180)}


def check_overlap(subject: Subject) -> Iterator[Finding]:
    """Look for training samples in the validation split, by a hash of their inputs as they are stored.

    Tables with few categories and short texts repeat themselves by nature. How often a training sample occurs again in
    the training split says how often a validation sample may.
    """
    yield from on_main(subject, lambda: [_judge_overlap(subject)])


class _Part(NamedTuple):
    """The samples of a split that were looked at."""

    numbers: Hashes  # of the samples
    inputs: Hashes
    both: Hashes  # of inputs and targets together


def _judge_overlap(subject: Subject) -> Finding:
    name, sizes = "train and validation", {split: len(samples) for split, samples in subject.task.splits.items()}
    validation, train = _hash_split(subject, "validation"), _hash_split(subject, "train")
    if not len(validation.inputs) or not len(train.inputs):
        return skip(name, "a split is empty")
    share_read = len(train.inputs) / sizes["train"]
    again = np.isin(validation.inputs, train.inputs)
    other_label = again & ~np.isin(validation.both, train.both)
    _, counts = np.unique(train.inputs, return_counts=True)
    # Of a part of the training split, only that share of the copies is found.
    by_nature = min(1.0, float(counts[counts > 1].sum()) / len(train.inputs) / share_read)
    effective = len(validation.inputs) * share_read
    copies = int(again.sum())
    share = min(1.0, copies / effective)
    likely = max(by_nature, 1 / len(train.inputs))
    noise = 3 * math.sqrt(likely * (1 - likely * share_read) / effective)  # of a binomial count
    # Twice as many as by nature; or, where most occur twice, half of those that do not.
    limit = min(2 * by_nature + 0.02, (1 + by_nature) / 2) + noise
    failed = copies >= FEWEST_COPIES and share > COPIED and share > limit
    doubtful = share > by_nature + 0.001 + (noise if by_nature else 0.0)
    part = f"{len(train.inputs):,} of {sizes['train']:,} training samples"
    said = f"{copies:,} of {len(validation.inputs):,} validation samples are among {part}"
    if share_read < 1 and copies:
        said += f", {share:.1%} if the others are alike"
    if by_nature:
        said += f"; {by_nature:.1%} of training samples occur twice there"
    examples = _pair_up(train, validation, again)
    if copies and (failed or doubtful):
        said += "; such as " + ", ".join(f"{mine} (training sample {other})" for mine, other in examples[:3])
        if other_label.any():
            said += f"; {int(other_label.sum()):,} have other labels there"
    return judge(
        name,
        not failed and not doubtful,
        said,
        "no sample in both",
        (
            "the validation split was made of training samples, or read from the same files: --validation_split, or "
            "leave it out to have one cut",
            "the data hold copies: remove them before they are cut",
        ),
        otherwise="fail" if failed else "warn",
        copies=copies,
        share=share,
        by_nature=by_nature,
        looked_at={"train": len(train.inputs), "validation": len(validation.inputs)},
        other_labels=int(other_label.sum()),
        examples=examples,
    )


def _hash_split(subject: Subject, split: str) -> _Part:
    """Return hashes of the samples of a split, as far as the limits allow."""
    parts: list[tuple[Hashes, Hashes, Hashes]] = []
    for numbers, batch in read(subject, split, OVERLAP):
        inputs = inputs_of(subject, batch)
        targets = {name: batch[name] for name in subject.task.targets if name in batch}
        parts.append((numbers.numpy().astype(np.uint64), hash_rows(inputs), hash_rows({**inputs, **targets})))
    if not parts:
        return _Part(*(np.zeros(0, dtype=np.uint64) for _ in range(3)))
    return _Part(*(np.concatenate(columns) for columns in zip(*parts)))


def _pair_up(train: _Part, validation: _Part, again: np.ndarray[Any, Any], most: int = 20) -> list[tuple[int, int]]:
    """Return numbers of a validation and a training sample that are equal, the lowest ones."""
    chosen = np.flatnonzero(again)[np.argsort(validation.numbers[again])][:most]
    order = np.lexsort((train.numbers, train.inputs))
    places = order[np.searchsorted(train.inputs, validation.inputs[chosen], sorter=order)]
    return [(int(mine), int(other)) for mine, other in zip(validation.numbers[chosen], train.numbers[places])]
