"""The learning rate as a pure function of the optimizer step, and reduce-on-plateau as a small state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from train.engine.settings import ScheduleSettings

Schedule = Callable[[int], float]


def count_steps(settings: ScheduleSettings, steps_per_epoch: int) -> int:
    """Return the optimizer step at which a run is finished."""
    if settings.dry_run:
        return 1
    steps = settings.num_train_epochs * steps_per_epoch
    return steps if settings.max_train_steps is None else min(steps, settings.max_train_steps)


def build_schedule(settings: ScheduleSettings, total_steps: int) -> Schedule:
    """Return the factor on the peak learning rate for the update that follows `step` finished ones.

    Linear and cosine fall to 0 after `total_steps`. One-cycle rises from 1/25 of the peak (over warmup_steps, or 30 %
    of the run if that is 0) and falls to 1/250,000, both along a cosine.

    Source: torch.optim.lr_scheduler.OneCycleLR, StepLR, CosineAnnealingLR (torch 2.13) give the same values.
    """
    warmup = settings.warmup_steps
    if settings.lr_scheduler == "one_cycle":
        # torch puts the peak at pct_start * total - 1, the lowest rate at total - 1.
        peak = float(warmup or 0.3 * total_steps) - 1
        last = total_steps - 1
        return lambda step: _one_cycle(step, peak, last)

    def shape(step: int) -> float:
        fraction = min(1.0, step / max(1, total_steps - warmup))
        if settings.lr_scheduler == "step":
            return settings.lr_gamma ** (step // settings.lr_step_size)
        if settings.lr_scheduler == "linear":
            return 1.0 - fraction
        if settings.lr_scheduler == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * fraction))
        return 1.0  # constant, and plateau before its first reduction

    return lambda step: (step + 1) / warmup if step < warmup else shape(step - warmup)


def _one_cycle(step: int, peak: float, last: int) -> float:
    if step <= peak:
        return _cosine(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
    return _cosine(1.0, 1 / 25 / 1e4, min(1.0, (step - peak) / max(1e-9, last - peak)))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * fraction))


@dataclass
class Plateau:
    """Reduce-on-plateau: after more than `patience` evaluations without improvement, `scale` falls by `factor`.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau (torch 2.13) with its relative threshold of 1e-4.
    """

    scale: float = 1.0
    best: float | None = None
    bad_evaluations: int = 0

    def update(self, value: float, factor: float, patience: int) -> None:
        """Take the value of one evaluation, lower being better; it must be at least 0. NaN is no improvement."""
        if not math.isnan(value) and (self.best is None or value < self.best * (1.0 - 1e-4)):
            self.best, self.bad_evaluations = value, 0
        else:
            self.bad_evaluations += 1
        if self.bad_evaluations > patience:
            self.scale *= factor
            self.bad_evaluations = 0


@dataclass
class EarlyStopping:
    """Counts evaluations in a row that did not improve by more than `min_delta`; lower values are better."""

    best: float | None = None
    bad_evaluations: int = 0

    def update(self, value: float, min_delta: float) -> None:
        """Take the value of one evaluation. NaN is no improvement."""
        if not math.isnan(value) and (self.best is None or value < self.best - min_delta):
            self.best, self.bad_evaluations = value, 0
        else:
            self.bad_evaluations += 1

    def exhausted(self, patience: int) -> bool:
        """Say whether training should end; a patience of 0 never ends it."""
        return 0 < patience <= self.bad_evaluations
