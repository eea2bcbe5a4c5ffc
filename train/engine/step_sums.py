"""Sums of what the steps between two log lines measured, added up when somebody looks."""

from __future__ import annotations

import math
from functools import reduce
from itertools import islice
from operator import add
from typing import Any

import torch

MOST_STEPS = 256  # that are kept, for memory's sake, where nobody looks for long


class StepSums:
    """Keeps what each step measured: adding up at once would cost a dozen small operations a step, and a wait."""

    def __init__(self, max_grad_norm: float, *, on_cpu: bool) -> None:
        """Prepare for steps whose gradients are limited to a norm (0: not limited), on the CPU or on a device."""
        self._limit = max_grad_norm or math.inf
        self._on_cpu = on_cpu
        self._values: list[Any] = []  # of all steps, one after another: each slot's metrics, then the norm
        self._steps: list[tuple[int, int, int]] = []  # slots, metrics, samples

    @property
    def full(self) -> bool:
        """Whether it is time to add up."""
        return len(self._steps) >= MOST_STEPS

    def keep(self, slots: list[list[torch.Tensor]], count: int, norm: torch.Tensor) -> None:
        """Take a step's sum of each metric for each of its slots, its samples, and the norm of its gradient."""
        values = [*(value for slot in slots for value in slot), norm]
        self._values += [value.item() for value in values] if self._on_cpu else values
        self._steps.append((len(slots), len(slots[0]), count))

    def add_to(self, window: torch.Tensor | None) -> torch.Tensor | None:
        """Return the window with the steps kept, in float64; steps that are not finite were not applied.

        The window holds the sum of each metric, of samples, norms, clipped steps and steps. The sums are exact in the
        order of the steps, whenever they are made.
        """
        values, steps = self._values, self._steps
        self._values, self._steps = [], []
        if not steps:
            return window
        numbers = iter(values if self._on_cpu else torch.stack(values).tolist())  # waits for the device once
        totals = [0.0] * (steps[0][1] + 4) if window is None else window.tolist()
        for slots, metrics, count in steps:
            of_slots = [list(islice(numbers, metrics)) for _ in range(slots)]
            norm = next(numbers)
            if math.isfinite(norm):
                # Not sum(), which rounds otherwise from Python 3.12 on.
                sums = [reduce(add, of_metric) for of_metric in zip(*of_slots)]
                totals = list(map(add, totals, [*sums, count, norm, norm > self._limit, 1]))
        return torch.tensor(totals, dtype=torch.float64)
