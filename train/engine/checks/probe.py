"""The run's own loop, in the hands of a check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.engine.checks.subject import Subject
from train.engine.contract import GlobalBatch
from train.engine.errors import TrainingError
from train.engine.loop import Loop
from train.engine.run_directory import RunDirectory
from train.engine.session import Session
from train.engine.tracking import Tracker


def probe_loop(subject: Subject, run: RunDirectory | None = None, **changes: Any) -> Loop:
    """Return the run's own loop, which logs nothing, and saves into `run` only; the model is in training mode.

    Args:
        subject: whose state it will change.
        run: where it saves; nowhere for None.
        changes: settings that are others than the run's.
    """
    subject.state.model.train()
    return Loop(
        replace(subject.settings, **changes),
        subject.runtime,
        Session(run, None, subject.session.batching),
        subject.state,
        subject.loader,
        subject.measure,
        subject.evaluate,
        Tracker(None),
        subject.data,
    )


def coming_batches(loop: Loop) -> Iterator[GlobalBatch]:
    """Yield the batches that come next in the run, epoch after epoch; each must be used before the next is taken."""
    while True:
        progress = loop.state.progress
        yield from loop.loader.batches(progress.epoch, progress.sample)


def local_model(subject: Subject) -> nn.Module:
    """Return the model as the run computes it, compiled if it is, but without exchange with other processes."""
    model = subject.state.model
    return model.module if isinstance(model, DistributedDataParallel) else model


@dataclass(frozen=True)
class Taken:
    """What a step of the loop says of itself; NaN if it was not applied."""

    loss: float  # mean over the global batch, before the step
    norm: float  # of the gradient, before clipping

    @property
    def applied(self) -> bool:
        """Whether loss and gradient were finite."""
        return math.isfinite(self.norm)


def take_step(loop: Loop, batch: GlobalBatch) -> Taken:
    """Use one global batch; a step that is not finite is not applied, but raises nothing."""
    loop.add_up()
    loop.state.window = None
    with suppress(TrainingError):  # raised on the CPU only; the sums say the same on any device
        loop.step(batch)
    loop.add_up()
    assert loop.state.window is not None
    *totals, count, norm, _, steps = loop.runtime.sum(loop.state.window).tolist()
    if steps == 0:
        return Taken(math.nan, math.nan)
    return Taken(totals[loop.metric_names.index("loss")] / count, norm / steps)
