"""Does it learn: a few samples by heart, and from the labels something that holds for new samples.

Legend: N samples of validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import nn

from train.engine.checks.finding import Finding, judge, number, skip
from train.engine.checks.subject import Snapshot, Subject, batch_length, trial, turn_off_dropout
from train.engine.contract import Batch
from train.engine.randomness import derive_seed

RATE = 1e-3  # of Adam
FEW = 8  # samples to learn by heart
MOMENT = 200  # steps of another optimizer, to narrow a failure down
BATCH = 64
STAGES = (25, 100, 400)  # steps after which the probe looks whether it has learned something
HELD_OUT = 512  # samples of validation, at most
FEWEST = 20  # samples of validation, below which chance decides
SIGNIFICANT, HINT = 4.0, 2.0  # standard errors that prove learning, and below which there is no sign of it
POWER = 100  # samples of validation outside the largest class, below which a weak signal may stay unseen
KEPT = 0.25  # share of what is learned without augmentation that must be learned with it

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class _Fit:
    """How a few samples were learned."""

    curve: list[float]  # mean loss before each step, and at the end
    metrics: dict[str, float]  # at the end
    done: bool

    def __str__(self) -> str:
        metrics = "".join(f", {name} {number(value)}" for name, value in self.metrics.items() if name != "loss")
        return f"loss {number(self.curve[0])} to {number(self.curve[-1])}{metrics} in {len(self.curve) - 1} steps"


def check_overfit(subject: Subject) -> Iterator[Finding]:
    """Learn a few samples by heart, without dropout and augmentation; if that fails, try other optimizers."""
    task = subject.task
    with trial(subject) as snapshot:
        fit = _fit(subject, lambda parameters: torch.optim.Adam(parameters, RATE), task.overfit_steps)
        causes, slow = ((), False) if fit.done else _narrow_down(subject, snapshot, fit)
    wanted = "".join(f", {name} {number(value)}" for name, value in task.overfit_metrics.items())
    yield judge(
        "overfit one batch",
        fit.done,
        str(fit),
        f"loss below {task.overfit_share:.0%} of the first{wanted} in {task.overfit_steps} steps of Adam at {RATE:g}",
        causes,
        otherwise="warn" if slow or subject.settings.freeze else "fail",  # what is left may be too small for it
        curve=fit.curve,
        metrics=fit.metrics,
    )


def _fit(subject: Subject, build: Optimizers, steps: int) -> _Fit:
    """Train on a few samples until they are known by heart."""
    task = subject.task
    batch = subject.samples(FEW)
    turn_off_dropout(subject.state.model)
    optimizer = build([parameter for parameter in subject.model.parameters() if parameter.requires_grad])
    curve: list[float] = []
    while True:
        subject.seed(len(curve))
        values = subject.losses(batch)
        means = {name: float(value.detach().float().mean()) for name, value in values.items()}
        curve.append(means["loss"])
        perfect = all(means[name] == value for name, value in task.overfit_metrics.items())
        done = curve[-1] <= task.overfit_share * curve[0] and perfect and len(curve) > 1
        if done or len(curve) > steps or not math.isfinite(curve[-1]):
            return _Fit(curve, means, done)
        optimizer.zero_grad()
        values["loss"].float().mean().backward()
        optimizer.step()


def _narrow_down(subject: Subject, snapshot: Snapshot, failed: _Fit) -> tuple[tuple[str, ...], bool]:
    """Return the likely causes of a failure, and whether another optimizer had none on the same samples."""
    others: dict[str, Optimizers] = {
        f"Adam at {RATE * 10:g}": lambda parameters: torch.optim.Adam(parameters, RATE * 10),
        f"Adam at {RATE / 10:g}": lambda parameters: torch.optim.Adam(parameters, RATE / 10),
        "SGD with momentum at 0.1": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    }
    fits = {}
    for name, build in others.items():
        snapshot.restore()
        fits[name] = _fit(subject, build, MOMENT)
    faster, slower, plain = fits.values()
    lowest = min((fit.curve[-1] for fit in (failed, *fits.values()) if math.isfinite(fit.curve[-1])), default=math.nan)
    if lowest < 0:
        cause = "no such loss is below 0: its sign is wrong, or it takes log-probabilities and gets logits"
    elif lowest <= subject.task.overfit_share * failed.curve[0] and not faster.done:
        cause = "the loss is near 0 and the metric is not perfect: the metric is computed wrongly"
    elif faster.done:
        cause = "ten times the rate does it: gradients are small; check the scale of inputs and initial weights"
    elif slower.done or slower.curve[-1] < min(failed.curve[-1], failed.curve[0]):
        cause = "a tenth of the rate goes further: inputs or initial weights are too large, or try warm-up"
    elif plain.done:
        cause = "plain SGD does it: gradients differ by orders of magnitude between layers"
    elif not lowest < 0.95 * failed.curve[0]:
        cause = "no optimizer moves the loss: the graph is cut, see the check of gradient flow, or all is frozen"
    else:
        cause = (
            "it learns, but not to the end: outputs are squashed (a softmax, ReLU or sigmoid behind the last layer), "
            "the model is too small for these samples, equal samples have different labels, or the loss has a floor"
        )
    tried = f"tried besides: {'; '.join(f'{name}: {fit}' for name, fit in fits.items())}"
    return (cause, tried), any(fit.done for fit in fits.values())


@dataclass(frozen=True)
class _Probe:
    """What a model knows of validation after a moment of training."""

    loss_N: torch.Tensor
    metric_N: torch.Tensor  # the one that decides which checkpoint is best, so that less is better

    def better_than(self, other: _Probe) -> float:
        """Return by how many standard errors it is better, in loss or in metric."""
        return max(_errors(other.loss_N - self.loss_N), _errors(other.metric_N - self.metric_N))


def _errors(gain_N: torch.Tensor) -> float:
    """Return the mean in standard errors; what is the same for all samples counts by its sign."""
    mean, error = float(gain_N.mean()), float(gain_N.std()) / math.sqrt(len(gain_N))
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def check_learning(subject: Subject) -> Iterator[Finding]:
    """Train a moment on the run's own batches and on shuffled labels, and compare both on validation."""
    task = subject.task
    if not task.targets:
        return
    size = min(HELD_OUT, len(task.splits["validation"]))
    if size < FEWEST:
        yield skip("labels fit inputs", f"validation has {size} samples; {FEWEST} are needed to tell")
        return
    with trial(subject) as snapshot:
        best = -math.inf
        for steps in STAGES:
            snapshot.restore()
            true = _train(subject, steps, _own_batches(subject))
            snapshot.restore()
            shuffled = _train(subject, steps, _plain_batches(subject, shuffle=True))
            leaked, floor = _loss_of_shuffled(subject)
            lead = subject.runtime.broadcast(true.better_than(shuffled))  # all processes go on together
            if lead > best:
                best, said = lead, _say_losses(subject, steps, true, shuffled)
            if lead > SIGNIFICANT:
                break
        plain = None
        if task.augmented:
            snapshot.restore()
            plain = _train(subject, steps, _plain_batches(subject))
    learned = best > SIGNIFICANT
    if learned or plain is None or plain.better_than(shuffled) <= SIGNIFICANT:
        yield _labels_fit(subject, best, f"{said} better by {number(best)} standard errors")
    if plain is not None:
        yield _augmentation_keeps(true, plain, shuffled, steps)
    error = float(leaked.std()) / math.sqrt(size)
    yield judge(
        "shuffled labels",
        float(leaked.mean()) > floor - SIGNIFICANT * error - 0.02 * floor,
        f"loss {number(float(leaked.mean()))} on shuffled labels of validation",
        f"not below {number(floor)}, which needs no input: nobody can know shuffled labels",
        ("a label enters the model, or the loss divides it out: see the check of labels out of sight",),
        loss=float(leaked.mean()),
        floor=floor,
    )


def _say_losses(subject: Subject, steps: int, true: _Probe, shuffled: _Probe) -> str:
    losses = [number(float(probe.loss_N.mean())) for probe in (true, shuffled)]
    by_loss = _errors(shuffled.loss_N - true.loss_N) >= _errors(shuffled.metric_N - true.metric_N)
    where = ":" if by_loss else f"; in {subject.settings.best_metric}"
    return f"after {steps} steps validation loss {losses[0]}, and {losses[1]} from shuffled labels{where}"


def _labels_fit(subject: Subject, lead: float, said: str) -> Finding:
    """Judge how much more true labels teach; a weak signal in few samples is no proof of a bug."""
    targets = torch.cat([batch[subject.task.targets[0]] for batch in _held_out(subject)])
    largest = 0 if targets.is_floating_point() else int(torch.bincount(targets.flatten()).max())
    telling = len(targets) - largest
    unclear = lead > HINT or telling < POWER
    causes = [
        "labels do not belong to their inputs: an order was changed on one side only (a shuffle, a sort, a merge); "
        "look at plots/first_batch.png and data.txt",
        "labels of training and validation are numbered differently: see the class names in data.txt",
        f"the task needs more than {STAGES[-1]} steps at {RATE:g}: train longer on one device and look",
    ]
    if unclear:
        weak = f"too few samples to tell: {telling} of validation are outside the largest class, or the signal is weak"
        causes.insert(0, weak)
    return judge(
        "labels fit inputs",
        lead > SIGNIFICANT,
        said,
        f"true labels teach more than shuffled ones, by {SIGNIFICANT:g} standard errors",
        tuple(causes),
        otherwise="warn" if unclear else "fail",
        lead=lead,
        telling=telling,
    )


def _augmentation_keeps(true: _Probe, plain: _Probe, shuffled: _Probe, steps: int) -> Finding:
    gains = [float((shuffled.metric_N - probe.metric_N).mean()) for probe in (true, plain)]
    return judge(
        "augmentation keeps labels",
        gains[0] >= KEPT * gains[1],
        f"after {steps} steps the gain over shuffled labels is {number(gains[0])}, and {number(gains[1])} without it",
        f"at least {KEPT:.0%} of what is learned without augmentation",
        (
            "--augment takes away what the label depends on: make it weaker, or leave out one after the other",
            "look at plots/first_batch.png: can you tell the classes apart?",
        ),
        with_augmentation=gains[0],
        without=gains[1],
    )


def _train(subject: Subject, steps: int, batches: Iterable[Batch]) -> _Probe:
    """Train from where the model is, and return what it then knows of validation."""
    trainable = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, RATE)
    subject.state.model.train()
    for step, batch in enumerate(islice(batches, steps)):
        subject.seed(step)
        optimizer.zero_grad()
        subject.losses(batch)["loss"].float().mean().backward()
        optimizer.step()
    values = _evaluate(subject, _held_out(subject))
    settings = subject.settings
    metric = values.get(settings.best_metric.removeprefix("val/").removeprefix("ema_"), values["loss"])
    return _Probe(values["loss"], metric if settings.mode == "min" else -metric)


def _own_batches(subject: Subject) -> Iterator[Batch]:
    """Yield the first part of each batch that the run will train on, epoch after epoch."""
    for epoch in count():
        for batch in subject.loader.batches(epoch, 0):
            slot = batch.slots[0]
            yield {name: value[: max(1, min(slot.count, BATCH))] for name, value in slot.batch.items()}


def _plain_batches(subject: Subject, *, shuffle: bool = False) -> Iterator[Batch]:
    """Yield training samples without augmentation, with each other's labels if wanted."""
    size = min(BATCH, subject.most)
    for step in count():
        batch = subject.samples(size, first=step * size)
        yield _shuffle(subject, batch, step) if shuffle else batch


def _loss_of_shuffled(subject: Subject) -> tuple[torch.Tensor, float]:
    """Return the loss on validation with shuffled labels [N], and the least that can be had without knowing them."""
    batches = [_shuffle(subject, batch, 0) for batch in _held_out(subject)]
    answers = {name: torch.cat([batch[name] for batch in batches]) for name in subject.task.targets}
    return _evaluate(subject, batches)["loss"], subject.task.constant_loss(answers)


def _held_out(subject: Subject) -> Iterator[Batch]:
    size = min(HELD_OUT, len(subject.task.splits["validation"]))
    for first in range(0, size, min(BATCH, subject.most)):
        yield subject.samples(min(BATCH, size - first), split="validation", first=first)


def _evaluate(subject: Subject, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Return what is measured of each sample, [N]."""
    subject.state.model.eval()
    with torch.no_grad():
        measured = [subject.losses(batch) for batch in batches]
    return {name: torch.cat([values[name] for values in measured]).float().cpu() for name in measured[0]}


def _shuffle(subject: Subject, batch: Batch, number: int) -> Batch:
    """Give the samples of a batch each other's targets."""
    generator = torch.Generator().manual_seed(derive_seed(subject.settings.seed, number) % 2**32)
    order = torch.randperm(batch_length(batch), generator=generator)
    return batch | {name: batch[name][order.to(batch[name].device)] for name in subject.task.targets}
