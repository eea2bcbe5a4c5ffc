"""Updates captured in CUDA graphs: the reference's operations, started all at once instead of one by one.

Not run on a GPU yet. On a CPU the same operations run uncaptured, which is how their arithmetic is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adam import adam

from models.frequency_lstm import State
from train.stateful.contract import SUMS, Course, DivergedError

UPDATES = 16  # of one graph; another one has a single update, for the rest of a stretch
WARM_UP = 3  # updates before a capture, for the libraries to choose and load their kernels


class CudaGraphEngine:
    """Trains without a word between host and device inside a stretch."""

    name = "fused"

    def __init__(self, course: Course) -> None:
        self._course = course
        self.most_samples = 4 * UPDATES * course.window
        self._parameters: list[torch.Tensor] = list(course.model.parameters())
        for parameter in self._parameters:
            if parameter not in course.optimizer.state:  # as torch's fused Adam would make it
                course.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        # Graphs read and write these, and nothing else but weights and moments.
        like: dict[str, Any] = {"dtype": course.inputs.dtype, "device": course.inputs.device}
        self._inputs = torch.zeros(UPDATES * course.window, course.inputs.shape[1], **like)
        self._targets = torch.zeros(UPDATES * course.window, 1, **like)
        self._rates = torch.zeros(UPDATES, **like)
        hidden_size = course.model.lstm.hidden_size
        self._state: State = (torch.zeros(1, 1, hidden_size, **like), torch.zeros(1, 1, hidden_size, **like))
        self._sums = torch.zeros(SUMS, dtype=torch.float64, device=course.inputs.device)
        self._diverged = torch.ones((), device=course.inputs.device)  # 1: no update is applied any more
        self._graphs = {}
        if course.inputs.device.type == "cuda":
            self._graphs = {count: self._capture(count) for count in (1, UPDATES)}

    def advance(self, start: int, stop: int, state: State | None, rates: Sequence[float], sums: torch.Tensor) -> State:
        """Train on a stretch; see Engine."""
        course, window = self._course, self._course.window
        for kept, given in zip(self._state, state if state is not None and start > 0 else (None, None)):
            kept.zero_() if given is None else kept.copy_(given)
        self._diverged.zero_()
        self._sums.zero_()
        done = 0
        while done < len(rates):
            first = start + done * window
            width = min(window, stop - first)
            count = UPDATES if first + UPDATES * window <= stop else 1
            last = min(first + count * window, stop)
            self._inputs[: last - first].copy_(course.inputs[first:last])
            self._targets[: last - first].copy_(course.targets[first:last])
            self._rates[:count].copy_(torch.tensor(rates[done : done + count], dtype=torch.float64))
            if count in self._graphs and width == window:
                self._graphs[count].replay()
            else:
                for number in range(count):
                    self._update(number, width)
            done += count
        measured = self._sums.cpu()
        sums += measured
        if self._diverged:
            raise DivergedError(int(measured[4]))
        course.optimizer.param_groups[0]["lr"] = rates[-1]
        return self._state[0].clone(), self._state[1].clone()

    def _capture(self, count: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._update(0, self._course.window)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(count):
                self._update(number, self._course.window)
        return graph

    def _update(self, number: int, width: int) -> None:
        """Take one update, on a window of `width` samples in the buffers; the device decides whether it is applied."""
        course = self._course
        now = slice(number * course.window, number * course.window + width)
        outputs, state = course.model(self._inputs[None, now], self._state)
        loss = F.mse_loss(outputs, self._targets[None, now])
        gradients = torch.autograd.grad(loss, self._parameters)
        loss = loss.detach()
        norm = nn.utils.get_total_norm(gradients)
        finite = (norm + loss).isfinite()
        self._diverged.copy_(torch.where(finite, self._diverged, torch.ones_like(self._diverged)))
        clipped = torch.zeros_like(norm)
        if course.max_grad_norm > 0:
            clipped = (norm > course.max_grad_norm).to(norm.dtype)
            gradients = torch._foreach_mul(gradients, (course.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        group = course.optimizer.param_groups[0]
        states = [course.optimizer.state[parameter] for parameter in self._parameters]
        with torch.no_grad():
            adam(
                self._parameters,
                list(gradients),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=self._diverged,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=self._rates[number],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            applied = self._diverged == 0
            part = torch.stack([loss * width, torch.full_like(loss, width), norm, clipped, torch.ones_like(loss)])
            self._sums += torch.where(applied, part, torch.zeros_like(part))
            for kept, new in zip(self._state, state):
                kept.copy_(torch.where(applied, new, kept))
