"""Which engine trains: the fast one, if it is to be had here and does what the reference does."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Literal

import torch

from train.engine.errors import UsageError
from train.stateful.contract import SUMS, Course, Engine
from train.stateful.eager import EagerEngine

TRIAL_UPDATES = 8
# Samples of an update in the trial, at most: over hundreds of them rounding alone grows to some percent.
TRIAL_WINDOW = 8
TOLERANCE = 1e-3  # of the largest value of each tensor; the engines were at most 4e-5 apart, for 100 seeds and windows

PATIENCE_SECONDS = 4

Build = Callable[[Course], Engine]


def choose_engine(wish: str, course: Course) -> tuple[Literal["eager", "fused"], Build, str]:
    """Return the name of the engine, what builds it, and a line that says which it is and why.

    The fast engine proves itself on copies, for a few updates on random samples: what a compiler makes of it on this
    machine is not what it made elsewhere.

    Args:
        wish: "auto", "eager" or "fused".
        course: what will be trained; stays as it is.

    Raises:
        UsageError: "fused" is asked for and is not to be had.
    """
    if wish == "eager":
        return "eager", EagerEngine, "engine: eager (PyTorch, one operation after the other)"
    try:
        build, what = _import_fast(course.inputs.device)
        notice = threading.Timer(PATIENCE_SECONDS, print, [f"compiling {what}, once for this machine"], {"flush": True})
        notice.daemon = True
        notice.start()
        try:
            distance = _compare(build, course)
        finally:
            notice.cancel()
        problem = None if distance <= TOLERANCE else f"it is {distance:.1e} away from the reference"
    except Exception as error:  # whatever a compiler or a driver raises, training can go on without it; it is said
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem is None:
        return (
            "fused",
            build,
            f"engine: fused ({what}; {distance:.1e} from the reference after {TRIAL_UPDATES} updates)",
        )
    if wish == "fused":
        raise UsageError(f"--engine fused is not to be had here: {problem}; leave --engine out")
    return "eager", EagerEngine, f"engine: eager, since the fused one is not to be had here: {problem}"


def _import_fast(device: torch.device) -> tuple[Build, str]:
    if device.type == "cuda":
        from train.stateful.cuda_graph import CudaGraphEngine

        return CudaGraphEngine, "updates captured in CUDA graphs"
    if device.type == "cpu":
        from train.stateful.fused import FusedEngine

        return FusedEngine, "one compiled kernel"
    raise ValueError(f"there is none for {device.type}")


def _compare(build: Build, course: Course) -> float:
    """Return how far an engine is from the reference: the largest distance relative to each tensor's largest value."""
    window = min(course.window, TRIAL_WINDOW)
    samples = TRIAL_UPDATES * window
    draw = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(samples, width, generator=draw).to(course.inputs) for width in (course.inputs.shape[1], 1)
    )
    results: list[list[torch.Tensor]] = []
    for engine in (build, EagerEngine):
        model = copy.deepcopy(course.model)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        trial = Course(model, optimizer, inputs, targets, window, course.max_grad_norm)
        sums = torch.zeros(SUMS, dtype=torch.float64)
        state = engine(trial).advance(0, samples, None, [1e-3] * TRIAL_UPDATES, sums)
        results.append([*(parameter.detach() for parameter in model.parameters()), *state, sums])
    distances = [((one - other).abs().max() / other.abs().max()).double().cpu() for one, other in zip(*results)]
    return float(torch.stack(distances).max())  # NaN where one is NaN, which Python's max would pass over
