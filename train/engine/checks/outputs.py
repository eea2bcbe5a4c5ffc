"""What an untrained model answers, and what it loses, against theory. Legend: B samples, K outputs of a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from train.engine.checks.finding import Finding, judge, number
from train.engine.checks.subject import Subject, batch_length, turn_off_dropout

SAMPLES = 256
OFF = 0.5  # distance from the theoretical loss that is worth a warning
PROBABILITIES = 1e-3  # rows whose sum is that near to 1 are probabilities
CLAMPED = 0.05  # share of outputs that are exactly 0 behind a ReLU; by chance none is


def check_outputs(subject: Subject) -> Iterator[Finding]:
    """Look at the outputs: finite, as many as there are classes, neither squashed nor the same for all samples."""
    batch = subject.samples(SAMPLES)
    turn_off_dropout(subject.state.model)
    outputs = subject.outputs(batch)
    if outputs.ndim == 0 or len(outputs) != batch_length(batch):
        measured, wanted = f"shape {list(outputs.shape)}", f"one for each of {batch_length(batch)} samples"
        cause = "the model mixes samples or sums over them: look at forward"
        yield judge("outputs", False, measured, wanted, (cause,), stop=True)
        return
    outputs_BK = outputs.flatten(1)
    finite = bool(outputs_BK.isfinite().all())
    low, high, mean, std = (
        float(value) for value in (outputs_BK.min(), outputs_BK.max(), outputs_BK.mean(), outputs_BK.std())
    )
    yield judge(
        "outputs",
        finite,
        f"shape {list(outputs.shape)}, {number(low)} to {number(high)}, mean {number(mean)}, std {number(std)}",
        "finite numbers",
        (
            "the initial weights or a division in the model give NaN or infinity: look at each layer's output",
            "inputs that are not normalised overflow in low precision: see the check of inputs, try "
            "--mixed_precision no",
        ),
        stop=True,
        shape=list(outputs.shape),
        min=low,
        max=high,
        mean=mean,
        std=std,
    )
    if not finite:
        return
    yield _depend_on_inputs(outputs_BK)
    if subject.task.num_classes is not None:
        yield _classes(subject, outputs)
        yield _logits(outputs_BK)


def _depend_on_inputs(outputs_BK: torch.Tensor) -> Finding:
    spread = float((outputs_BK - outputs_BK[:1]).abs().max())
    size = float(outputs_BK.abs().max())
    return judge(
        "outputs differ",
        spread > 1e-6 * size,
        f"samples' outputs differ by up to {number(spread)}",
        "different samples get different outputs",
        (
            "an activation is dead or saturated for all samples: look at the layers with zero gradient",
            "the model does not use its input: look at forward",
            "all inputs are equal: see the check of inputs",
        ),
        spread=spread,
    )


def _classes(subject: Subject, outputs: torch.Tensor) -> Finding:
    classes = subject.task.num_classes
    return judge(
        "number of classes",
        outputs.ndim == 2 and outputs.shape[1] == classes,
        f"outputs of shape {list(outputs.shape[1:])}, {classes} classes in the data",
        f"one output for each of {classes} classes",
        (
            f"the last layer has another number of outputs than the data has classes: build it with {classes}",
            "the label column is another one than you think: --label_column",
        ),
        stop=True,  # a label without an output is an error on a CPU, and brings a GPU's whole process down
        outputs=list(outputs.shape[1:]),
        classes=classes,
    )


def _logits(outputs_BK: torch.Tensor) -> Finding:
    """Logits take any value; a softmax or ReLU behind the last layer shows in theirs."""
    sums = outputs_BK.sum(dim=1)
    low, zeros = float(outputs_BK.min()), float((outputs_BK == 0).float().mean())
    probabilities = low >= 0 and outputs_BK.shape[1] > 1 and bool(((sums - 1).abs() < PROBABILITIES).all())
    clamped = low >= 0 and zeros > CLAMPED
    measured = "any value"
    causes: tuple[str, ...] = ()
    if probabilities:
        measured = "probabilities: none negative, each row adds up to 1"
        causes = (
            "a softmax stands behind the last layer, and cross-entropy applies one itself: return the logits",
            "the loss is not cross-entropy: then it is this check that is wrong, see --preflight off",
        )
    elif clamped:
        measured = f"none negative, {zeros:.0%} exactly 0"
        causes = ("a ReLU stands behind the last layer: wrong classes cannot be ruled out; return its input instead",)
    return judge(
        "logits", not (probabilities or clamped), measured, "logits: of both signs, no softmax or ReLU behind", causes,
        zeros=zeros,
    )  # fmt: skip


def check_initial_loss(subject: Subject) -> Iterator[Finding]:
    """Compare the mean loss of the untrained model with theory (log C for cross-entropy of C classes)."""
    batch = subject.samples(SAMPLES)
    turn_off_dropout(subject.state.model)
    with torch.no_grad():
        losses = subject.losses(batch)["loss"]
    if losses.shape != (batch_length(batch),):
        measured, wanted = f"loss of shape {list(losses.shape)}", f"one loss for each of {batch_length(batch)} samples"
        cause = 'reduction="none" is missing in the loss, or its values were averaged: the loop itself takes the mean'
        yield judge("loss at initialisation", False, measured, wanted, (cause,), stop=True)
        return
    loss, theory = float(losses.float().mean()), subject.task.untrained_loss(batch)
    # An untrained model may guess well by chance, where classes lie far apart, but not the labels of other samples: a
    # loss that is too low for those is computed wrongly.
    unknown, least = loss, theory
    if subject.task.targets:
        turned = batch | {name: batch[name].flip(0) for name in subject.task.targets}
        with torch.no_grad():
            unknown = float(subject.losses(turned)["loss"].float().mean())
        least = subject.task.constant_loss(batch)
    # Theory knows of random weights only.
    random = subject.session.origin is None
    far, impossible = random and not abs(loss - theory) <= OFF, not unknown >= least / 2
    yield judge(
        "loss at initialisation",
        not far and not impossible,
        number(loss),
        f"{number(theory)}, at most {OFF} away" if random else f"{number(theory)} or any other, with --init_from",
        _causes_of_loss(loss, theory),
        otherwise="fail" if impossible else "warn",
        loss=loss,
        theory=theory,
    )


def _causes_of_loss(loss: float, theory: float) -> tuple[str, ...]:
    if loss < 0:
        return ("no such loss is below 0: its sign is wrong, or it takes log-probabilities and gets logits",)
    if loss < theory:
        return (
            "the loss is divided twice, such as by the batch size or the accumulation: the loop does that",
            "the model sees the answer: see the check of labels out of sight",
        )
    return (
        "inputs are not normalised: see the check of scale",
        "the initial weights of the last layer are too large: try a tenth of them, or zero",
        "the last layer has another number of outputs than there are classes",
    )
