"""Shares of classes: cutting samples into parts with the same shares, and weights that even them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def stratified_parts(labels: torch.Tensor, fractions: Sequence[float], seed: int) -> list[torch.Tensor]:
    """Cut sample numbers into parts of the given fractions, class by class, in a shuffled but fixed way.

    Every part gets at least one sample of a class that has at least as many samples as there are parts.

    Returns:
        One sorted int64 tensor of sample numbers for each fraction; together they hold every sample once.
    """
    assert abs(sum(fractions) - 1.0) < 1e-9
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[torch.Tensor]] = [[] for _ in fractions]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        least = 1 if len(members) >= len(fractions) else 0
        counts = [max(least, round(fraction * len(members))) for fraction in fractions]
        counts[0] = len(members) - sum(counts[1:])
        while counts[0] < least:  # rounding up took too much
            counts[counts.index(max(counts[1:]), 1)] -= 1
            counts[0] += 1
        for part, piece in zip(parts, members.split(counts)):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def class_weights(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return a weight for each class, float32 [num_classes]: inverse to its frequency, 1 on average over the samples.

    A class without samples gets 0.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    present = (counts > 0).sum()
    return torch.where(counts > 0, len(labels) / (present * counts.clamp(min=1)), 0.0).float()
