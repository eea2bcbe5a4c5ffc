"""The running average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.engine.state import RunState
from train.engine.tensors import Tensors, assign


@torch.no_grad()
def update_average(average: Tensors, live: Tensors, decay: float, step: int) -> None:
    """Move the average towards the weights after an update; `step` counts updates from 1.

    The decay rises from 2/11, so that the average forgets the initial weights in short runs too. Buffers of whole
    numbers are copied.
    """
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    floating = [name for name, value in live.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floating], [live[name] for name in floating], weight)
    for name in live.keys() - set(floating):
        average[name].copy_(live[name])


@contextmanager
def averaged_weights(state: RunState, live: Tensors) -> Iterator[None]:
    """Put the averaged weights into the model while it is entered."""
    assert state.ema is not None
    with torch.no_grad():
        kept = {name: value.detach().clone() for name, value in live.items()}
        assign(state.model, live, state.ema)
        try:
            yield
        finally:
            assign(state.model, live, kept)
