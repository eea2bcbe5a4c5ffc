"""The engine of the CPU: all updates of a stretch in one compiled loop. Legend: H hidden state.

Needs numba. The first call compiles for 10 to 15 seconds for each type of number, once: numba keeps the result in
__pycache__ or, where that cannot be written, in the user's cache. Threads of Python go on during a call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from models.frequency_lstm import State
from train.stateful.contract import Course, DivergedError
from train.stateful.kernel import train


class FusedEngine:
    """Trains on the CPU with the gradient in closed form, and with Adam in the same compiled loop."""

    name = "fused"

    def __init__(self, course: Course) -> None:
        self._course = course
        self._parameters = list(course.model.parameters())
        self._inputs, self._targets = course.inputs.contiguous().numpy(), course.targets.contiguous().numpy()
        # A tenth of a second. Measured: 2 us an update at H 16, 15 at 64, 330 at 256; 5 us a sample at 64, window 100.
        nanoseconds = (500 + sum(parameter.numel() for parameter in self._parameters)) * (1 + 0.3 * course.window)
        self.most_samples = course.window * max(1, int(1e8 / nanoseconds))

    def advance(self, start: int, stop: int, state: State | None, rates: Sequence[float], sums: torch.Tensor) -> State:
        """Train on a stretch; see Engine."""
        course, group = self._course, self._course.optimizer.param_groups[0]
        if state is None:
            zeros = self._parameters[0].new_zeros(1, 1, course.model.lstm.hidden_size)
            state = zeros, zeros
        hidden, cell = (part.detach().clone() for part in state)
        moments = [self._moments(parameter) for parameter in self._parameters]
        steps = moments[0]["step"]
        # Saturated gates have gradients whose squares are subnormal numbers; those make a processor ten times slower.
        torch.set_flush_denormal(True)
        try:
            done: int = train(
                (self._inputs, self._targets, start, stop, course.window),
                tuple(parameter.detach().numpy() for parameter in self._parameters),
                tuple(moment["exp_avg"].numpy() for moment in moments),
                tuple(moment["exp_avg_sq"].numpy() for moment in moments),
                (hidden.numpy().reshape(-1), cell.numpy().reshape(-1)),
                steps.numpy().reshape(1),
                (np.asarray(rates, dtype=np.float64), *group["betas"], group["eps"], float(course.max_grad_norm)),
                sums.numpy(),
            )
        finally:
            torch.set_flush_denormal(False)
        for moment in moments[1:]:
            moment["step"].copy_(steps)
        if done:
            group["lr"] = rates[done - 1]
        if start + done * course.window < stop:
            raise DivergedError(done)
        return hidden, cell

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of the optimizer for a parameter; make it as torch does where there is none."""
        moments: dict[str, torch.Tensor] = self._course.optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.tensor(0.0, dtype=torch.float32)
            moments["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            moments["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return moments
