"""What preflight examines, and how it leaves no trace there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.engine.contract import Batch, Loader, Measure, Score, Task
from train.engine.randomness import capture_rng, derive_seed, restore_rng, seed_torch
from train.engine.runtime import Runtime
from train.engine.session import Session
from train.engine.settings import TrainSettings
from train.engine.state import RunState, capture, restore
from train.engine.tensors import full, reshard, unwrap


@dataclass
class Subject:
    """A run that is ready to start."""

    settings: TrainSettings
    runtime: Runtime
    session: Session
    state: RunState
    loader: Loader
    measure: Measure
    evaluate: Score  # of the validation split
    data: dict[str, Any]  # what a checkpoint remembers of the data
    task: Task

    @property
    def model(self) -> nn.Module:
        """The model without wrappers: what it computes is exchanged with no other process, but for FSDP2."""
        return unwrap(self.state.model)

    @property
    def most(self) -> int:
        """Samples that a check may use at once: what the run takes in one forward pass, but two to compare."""
        return max(2, self.session.batching.batch_size // self.session.batching.slots)

    def samples(self, count: int, *, split: str = "train", first: int = 0, epoch: int | None = None) -> Batch:
        """Return up to `count` samples, and up to `most`, as the network sees them, the same on every process.

        Args:
            count: of the samples.
            split: that they are of.
            first: number of the first one in a fixed order that goes all over the split.
            epoch: whose augmentation they get; none for None.
        """
        chosen = self.numbers(split, min(count, self.most), first=first)
        return self.task.load(split, chosen, epoch)

    def numbers(self, split: str, count: int, *, first: int = 0) -> torch.Tensor:
        """Return up to `count` different numbers of samples, all over the split, always the same ones, int64."""
        size = len(self.task.splits[split])
        # Steps of the golden section never meet twice and leave no gap; a permutation of 10**8 would take a minute.
        stride = round(size * 0.618) or 1
        while math.gcd(stride, size) > 1:
            stride += 1
        start = derive_seed(self.settings.seed, size) % size
        return (start + torch.arange(first, first + min(count, size)) * stride) % size

    def seed(self, *numbers: int) -> None:
        """Seed what the model draws from, by numbers of the caller's choice."""
        seed_torch(derive_seed(self.settings.seed, *numbers), self.runtime.device)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return what the script measures of each sample, [B], in the run's precision."""
        with self.runtime.accelerator.autocast():
            return self.measure(self.model, batch)

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Return what the model answers, float32 [B, ...], in the run's precision and without gradients."""
        with torch.no_grad(), self.runtime.accelerator.autocast():
            return self.task.predict(self.model, batch).float()


def batch_length(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    return len(next(iter(batch.values())))


def turn_off_dropout(model: nn.Module) -> None:
    """Put a model into evaluation mode, but for batch norm, whose averages have seen nothing before training."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


@contextmanager
def without_trace(subject: Subject) -> Iterator[None]:
    """Put back what a check may have changed: generators, buffers, gradients, mode, data position. Not the weights."""
    model, state = subject.state.model, subject.state
    generators = capture_rng(subject.runtime.device)
    buffers = [buffer.clone() for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    stream = state.progress.stream
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers):
                buffer.copy_(value)
        reshard(model)  # the loop would collect whole parameters, which never get a gradient
        state.optimizer.zero_grad(set_to_none=True)
        for parameter in model.parameters():  # those that the optimizer does not have, too
            parameter.grad = None
        state.progress.stream = stream
        restore_rng(generators, subject.runtime.device)


class Snapshot:
    """A copy of all that a run is, in memory: what a checkpoint holds. All processes take and restore it together."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        files, self._record = capture(subject.state, subject.runtime)
        self._files = {
            part: {name: full(tensor).clone() for name, tensor in tensors.items()} for part, tensors in files.items()
        }

    def restore(self) -> None:
        """Put the run into the copied state."""
        state = self._subject.state
        restore(state, self._subject.runtime, self._files, self._record)
        for parameter in state.model.parameters():
            parameter.grad = None


@contextmanager
def trial(subject: Subject) -> Iterator[Snapshot]:
    """Let the weights be changed, and put everything back at the end. `restore` on what it gives starts over."""
    with without_trace(subject):
        snapshot = Snapshot(subject)
        try:
            yield snapshot
        finally:
            snapshot.restore()
