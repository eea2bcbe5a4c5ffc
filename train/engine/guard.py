"""The guard against NaN and infinity: counts steps that were not applied, and says when to stop."""

from __future__ import annotations

import math

import torch

from train.engine.errors import TrainingError, see
from train.engine.state import Progress

MOST_IN_A_ROW = 10
# With fp16 the loss scale starts at 65,536 and may halve many times before the first finite step.
MOST_IN_A_ROW_FP16 = 40


class Guard:
    """Collects gradient norms; looking at them waits for the device, so on a GPU many are looked at together."""

    def __init__(self, *, skip: bool, fp16: bool) -> None:
        """Prepare to forgive single steps if `skip`, or with fp16, where the loss scale has to find its level."""
        self._forgiving = skip or fp16
        self._silent = fp16
        self._most = MOST_IN_A_ROW_FP16 if fp16 else MOST_IN_A_ROW
        self._norms: list[tuple[int, float, torch.Tensor]] = []

    def watch(self, step: int, rate: float, norm: torch.Tensor) -> None:
        """Take the gradient norm of a step (counted from 1) and its learning rate."""
        self._norms.append((step, rate, norm))

    def look(self, progress: Progress) -> list[str]:
        """Count the steps that were not applied and return a line for each.

        Raises:
            TrainingError: such a step may not be skipped, or there were too many in a row.
        """
        norms, self._norms = self._norms, []
        lines = []
        for step, rate, norm in norms:
            if math.isfinite(norm.item()):
                progress.skipped_in_a_row = 0
                continue
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            line = f"step {step}: the loss or a gradient is NaN or infinite (learning rate {rate:.3g}); not applied"
            if not self._forgiving or progress.skipped_in_a_row >= self._most:
                raise TrainingError(
                    f"{line}. {progress.skipped_in_a_row} in a row. Usual causes, in this order: the learning rate is "
                    "too high; the input holds NaN or is not normalised; log or division by zero in the loss; fp16 "
                    "overflow. Weights and checkpoints are intact. Go on with a lower --learning_rate (where there is "
                    "a checkpoint, also --allow_changes learning_rate), or with --on_nonfinite skip; "
                    f"{see('loss-is-nan-or-infinite')}"
                )
            lines.append(line)
        return [] if self._silent else lines
