"""Evaluation in which every sample counts exactly once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import nn

from train.engine.contract import Measure, Score, Slot, Watcher
from train.engine.runtime import Runtime
from train.engine.settings import RunSettings


def build_score(
    settings: RunSettings, runtime: Runtime, measure: Measure, slots: Iterable[Slot], watcher: Watcher | None = None
) -> Score:
    """Return what evaluates a model on this process's share of a split; of a dry run, on the first of its batches."""
    if settings.dry_run:
        slots = list(islice(slots, 1))

    def score(model: nn.Module) -> dict[str, float]:
        if watcher is None:
            return evaluate(model, measure, slots, runtime)
        values = evaluate(model, measure, slots, runtime, watcher.watch)
        watcher.draw(model)
        return values

    return score


class EvaluationStoppedError(Exception):
    """All processes agreed to stop in the midst of an evaluation."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    measure: Measure,
    slots: Iterable[Slot],
    runtime: Runtime,
    watch: Callable[[Slot, dict[str, torch.Tensor]], None] = lambda slot, values: None,
) -> dict[str, float]:
    """Return the mean of each metric over all samples of all processes.

    Sums are exact in float64 and reduced once at the end; means of batch means would be wrong for the last batch.
    `watch` is told what was measured of each slot, and may take values out of it.

    Raises:
        EvaluationStoppedError: on all processes, if one of them was asked to stop.
    """
    was_training = model.training
    model.eval()
    sums: torch.Tensor | None = None
    names: list[str] = []
    try:
        for slot in slots:
            if runtime.asked_to_stop():
                raise EvaluationStoppedError
            values = measure(model, slot.batch)
            watch(slot, values)
            names = list(values)
            part = add_up(values, slot.count)
            sums = part if sums is None else sums + part
    finally:
        model.train(was_training)
    assert sums is not None, "every process gets at least one evaluation batch"
    *totals, count = runtime.sum(sums).tolist()
    return {name: total / count for name, total in zip(names, totals)}


def add_up(values: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """Return the sums of per-sample values over the first `count` samples, and the count, float64 [metrics + 1]."""
    sums = [value.detach()[:count].sum() for value in values.values()]
    # float64 does not exist on Apple's GPUs.
    kind = torch.float32 if sums[0].device.type == "mps" else torch.float64
    return torch.stack([*sums, torch.tensor(float(count), device=sums[0].device)]).to(kind)
