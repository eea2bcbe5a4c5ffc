"""What the loop of a stateful model and its engines agree on. Legend: N samples, F input columns, H hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from models.frequency_lstm import FrequencyLSTM, State

# What an engine adds to the sums, in this order: squared errors, samples, gradient norms before clipping, updates that
# were clipped, updates.
SUMS = 5


class DivergedError(RuntimeError):
    """An update was not applied, because its loss or gradient is NaN or infinite. Those before it were."""

    def __init__(self, updates: int) -> None:
        self.updates = updates  # that were applied since the call
        super().__init__(f"update {updates + 1} of the chunk is not finite")


@dataclass(frozen=True)
class Course:
    """What is trained on what, and how."""

    model: FrequencyLSTM
    optimizer: torch.optim.Adam  # of one group, with the parameters of the model in their order
    inputs: torch.Tensor  # [N, F]
    targets: torch.Tensor  # [N, 1]
    window: int  # samples of one update, through which the gradient flows back
    max_grad_norm: float  # 0: no clipping


class Engine(Protocol):
    """Takes the updates of a stretch of the sequence, in place on the weights and the moments."""

    @property
    def name(self) -> str: ...

    @property
    def most_samples(self) -> int:
        """How long a stretch may be for a signal to be heard in time."""
        ...

    def advance(self, start: int, stop: int, state: State | None, rates: Sequence[float], sums: torch.Tensor) -> State:
        """Train on the samples from `start` to before `stop`, a window to each update, and return the state after.

        Args:
            start: number of the first sample, a multiple of the window.
            stop: another one, or the number of samples.
            state: after the samples before; no matter at sample 0, where every epoch starts afresh.
            rates: the learning rate of each update.
            sums: float64 [5] on the CPU, to which the engine adds.

        Raises:
            DivergedError: an update is not finite. It and all later ones were not applied, nor added to the sums.
        """
        ...
