"""Orders of samples for an epoch besides the plain one, each a pure function of its arguments. Legend: N samples."""

from __future__ import annotations

import torch

from data_modules.augmentation import random_bits
from data_modules.sampler import epoch_order

CHUNK_BATCHES = 50  # among so many batches, samples of like length are brought together

# Streams of random bits; augmentation has those below 100.
_CLASSES, _DRAWS, _PLACES, _BATCHES = range(100, 104)


def balanced_order(seed: int, epoch: int, labels: torch.Tensor) -> torch.Tensor:
    """Return N draws in which all classes that occur in `labels` come equally often.

    The counts of two classes differ by at most 1; which classes have the one more goes round from epoch to epoch.
    Inside a class no sample comes again before all have come: their counts differ by at most 1, too. So an epoch
    leaves out samples of large classes, others each time.

    Args:
        seed: of the run.
        epoch: counts from 0.
        labels: class numbers of the split, int64 [N].

    Returns:
        Sample numbers, int64 [N], shuffled.
    """
    num_samples = len(labels)
    if not num_samples:
        return torch.zeros(0, dtype=torch.int64)
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    num_classes = len(sizes)
    each, more = divmod(num_samples, num_classes)
    # Going on by `more` places in a fixed circle of the classes gives each as many over num_classes epochs.
    circle = _shuffled(seed, 0, _CLASSES, num_classes)
    quotas = torch.full((num_classes,), each)
    quotas[circle[(torch.arange(more) + epoch * more % num_classes) % num_classes]] += 1

    # Every class is written down, member by member, as often as its quota takes, and each of these rounds is shuffled:
    # a stable sort of a shuffled list by round. The quota then is cut from the front.
    rounds = -(-quotas // sizes)
    lengths = sizes * rounds
    owners = torch.arange(num_classes).repeat_interleave(lengths)
    places = torch.arange(len(owners)) - _starts(lengths)[owners]
    members = classes.argsort(stable=True)[_starts(sizes)[owners] + places % sizes[owners]]
    shuffled = _shuffled(seed, epoch, _DRAWS, len(owners))
    round_numbers = _starts(rounds)[owners] + places // sizes[owners]
    draws = members[shuffled[round_numbers[shuffled].argsort(stable=True)]]
    draws = draws[places < quotas[owners]]
    return draws[_shuffled(seed, epoch, _PLACES, num_samples)]


def bucketed_order(seed: int, epoch: int, lengths: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return an order whose batches hold samples of like length, so that little is padded.

    The epoch's permutation is cut into chunks of CHUNK_BATCHES batches. Each chunk is sorted by length, and its
    batches are shuffled. A short last batch is the end of the permutation as it is: cut from a sorted chunk, it would
    hold the longest samples every time.

    Args:
        seed: of the run.
        epoch: counts from 0.
        lengths: of the samples, int64 [N].
        batch_size: samples in a global batch.

    Returns:
        Sample numbers, int64 [N]: a permutation.
    """
    assert batch_size >= 1
    order = epoch_order(seed, epoch, len(lengths))
    num_batches = len(order) // batch_size
    full, rest = order[: num_batches * batch_size], order[num_batches * batch_size :]
    chunks = torch.arange(num_batches) // CHUNK_BATCHES
    # By length, then by chunk: the second sort is stable and keeps the lengths in order.
    by_length = lengths[full].argsort(stable=True)
    by_chunk = by_length[chunks.repeat_interleave(batch_size)[by_length].argsort(stable=True)]
    shuffled = _shuffled(seed, epoch, _BATCHES, num_batches)
    places = shuffled[chunks[shuffled].argsort(stable=True)]
    return torch.cat((full[by_chunk].view(num_batches, batch_size)[places].flatten(), rest))


def _shuffled(seed: int, epoch: int, purpose: int, count: int) -> torch.Tensor:
    """Return a permutation of 0..count-1; unlike torch's generator, which keeps 32 bits, it takes all of the seed."""
    return random_bits(seed, epoch, torch.arange(count), purpose).argsort(stable=True)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Return where each piece starts if pieces of these lengths are laid end to end."""
    return lengths.cumsum(0) - lengths
