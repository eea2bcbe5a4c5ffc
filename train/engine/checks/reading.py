"""Reading samples of a split, as many as a check may take, and telling them apart by hash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from train.engine.checks.finding import Finding, listing
from train.engine.checks.subject import Subject, batch_length
from train.engine.contract import Batch
from train.engine.errors import TrainingError

CHUNK_BYTES, CHUNK_SAMPLES = 16 * 2**20, 4096  # samples that are held at once
Gather = Callable[[torch.Tensor], Batch]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Limit:
    """How much of a split is read, whichever comes first. The time is for samples that take long to decode."""

    samples: int
    bytes: int
    seconds: float


def on_main(subject: Subject, work: Callable[[], list[Finding]]) -> list[Finding]:
    """Return on all processes what rank 0 finds; an error of any kind is raised on all of them."""

    def guarded() -> list[Finding]:
        try:
            return work()
        except (ValueError, TrainingError):
            raise
        except Exception as error:  # on_main hands on the two above only, and the others would wait for ever
            raise TrainingError(f"{type(error).__name__}: {error}") from error

    return subject.runtime.on_main(guarded)


def inputs_of(subject: Subject, batch: Batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in subject.task.inputs if name in batch}


def load_some(subject: Subject, count: int, epoch: int | None) -> dict[str, torch.Tensor]:
    """Return the inputs of training samples; more than one forward pass takes, where a few could be alike by chance."""
    numbers = subject.numbers("train", count)
    return inputs_of(subject, subject.task.load("train", numbers, epoch))


def read(
    subject: Subject, split: str, limits: Mapping[str, Limit], gather: Gather | None = None
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield numbers, in no order, and samples of a split in chunks, up to a limit."""
    limit = limits["full" if subject.settings.preflight == "full" else "quick"]
    samples = subject.task.splits[split]
    gather = gather or samples.gather
    numbers = subject.numbers(split, limit.samples)
    end = time.monotonic() + limit.seconds
    start = used = 0
    length = 16
    while start < len(numbers):
        part = numbers[start : start + length].sort().values
        batch = gather(part)
        start += len(part)
        used += sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
        yield part, batch
        each = max(1, used // start)
        # At most twice as many as before, so that the time is not passed by far where each takes long to decode.
        length = min(2 * length, CHUNK_SAMPLES, max(1, CHUNK_BYTES // each), (limit.bytes - used) // each)
        if length < 1 or time.monotonic() > end:
            return


def hash_rows(tensors: Mapping[str, torch.Tensor]) -> Hashes:
    """Return a hash of each sample, uint64 [B].

    Zeros at the end do not count: texts are padded to the longest one of those that were gathered together. So that
    two tensors are not taken for one, the length of each without those zeros goes in, too.
    """
    if not tensors:
        raise TrainingError("no tensor of the batch is an input of the task: mend the `inputs` of the task")
    rows = []
    for tensor in tensors.values():
        flat = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
        rows.append(flat.view(torch.uint8).numpy() if flat.shape[1] else np.zeros((len(flat), 0), dtype=np.uint8))
    hashes = np.empty(batch_length(dict(tensors)), dtype=np.uint64)
    for place, parts in enumerate(zip(*rows)):
        digest = xxhash.xxh3_64()
        for part in parts:
            content = part.tobytes().rstrip(b"\0")
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        hashes[place] = digest.intdigest()
    return hashes


def list_numbers(numbers: Sequence[int]) -> str:
    return listing([str(value) for value in numbers])
