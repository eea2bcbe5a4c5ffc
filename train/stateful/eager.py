"""The reference: one update after the other in plain PyTorch, to be read before anything else here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from models.frequency_lstm import State
from train.stateful.contract import Course, DivergedError


class EagerEngine:
    """Trains with autograd and torch.optim.Adam."""

    name = "eager"

    def __init__(self, course: Course) -> None:
        self._course = course
        self._parameters = list(course.model.parameters())
        self.most_samples = max(course.window, 32)

    def advance(self, start: int, stop: int, state: State | None, rates: Sequence[float], sums: torch.Tensor) -> State:
        """Train on a stretch; see Engine."""
        course, model, optimizer = self._course, self._course.model, self._course.optimizer
        for update, sample in enumerate(range(start, stop, course.window)):  # in the order of time, each sample once
            if sample == 0:
                state = None  # only an epoch starts afresh
            now = slice(sample, min(sample + course.window, stop))
            inputs, targets = course.inputs[None, now], course.targets[None, now]  # a batch of one
            outputs, state = model(inputs, state)  # the state after the samples before
            loss = F.mse_loss(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            state = state[0].detach(), state[1].detach()  # carried on, but no gradient flows back through it

            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            if not math.isfinite(loss.item() + norm.item()):
                raise DivergedError(update)
            if course.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(self._parameters, course.max_grad_norm, norm)
            optimizer.param_groups[0]["lr"] = rates[update]
            optimizer.step()
            samples, clipped = now.stop - now.start, 0 < course.max_grad_norm < norm.item()
            sums += torch.tensor([loss.item() * samples, samples, norm.item(), clipped, 1], dtype=torch.float64)
        assert state is not None
        return state
