"""Evaluation: gives the same answer when asked again, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from train.engine.checks.finding import Finding, judge, number, skip
from train.engine.checks.subject import Subject

SAMPLES = 64
CHUNK = 64
MOST = 20_000  # samples of validation that are measured a second time
SAME = 1e-4  # relative; kernels of a GPU that add in no fixed order differ by less


def check_evaluation(subject: Subject) -> Iterator[Finding]:
    """Evaluate the same samples twice, with different seeds, and compare outputs, buffers and modes."""
    model = subject.state.model
    batch = subject.samples(SAMPLES, split="validation")
    model.train()
    subject.outputs(batch)  # dropout and batch norm have been at work, as in training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    passes = []
    for seed in (1, 2):
        subject.seed(seed)
        passes.append(subject.outputs(batch))
    first, second = passes
    scale = max(float(first.abs().max()), 1e-12)
    difference = float((first - second).abs().max())
    yield judge(
        "evaluation repeats",
        difference <= SAME * scale,
        "two passes are equal to the last bit" if difference == 0 else f"two passes differ by {number(difference)}",
        "two passes over the same samples give the same",
        (
            "dropout stays on in evaluation: use nn.Dropout, or functional dropout with training=self.training",
            "forward draws random numbers in evaluation, too: ask self.training first",
        ),
        difference=difference,
    )
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    yield judge(
        "evaluation changes nothing",
        not changed,
        f"changed: {', '.join(changed)}" if changed else f"all {len(buffers)} buffers as they were",
        "evaluation leaves averages and counters alone",
        ("a layer updates its averages in evaluation: only do so if self.training",),
        changed=changed,
    )


def check_evaluation_data(subject: Subject) -> Iterator[Finding]:
    """Compare the run's evaluation with the mean over the same samples, each loaded by its number."""
    name = "evaluation counts all"
    size = len(subject.task.splits["validation"])
    if subject.settings.dry_run or size > MOST:
        yield skip(name, "a dry run evaluates one batch" if subject.settings.dry_run else f"{size:,} samples are many")
        return
    model = subject.state.model
    model.eval()
    found = subject.evaluate(model)
    sums: dict[str, float] = dict.fromkeys(found, 0.0)
    with torch.no_grad():
        for first in range(0, size, CHUNK):
            numbers = torch.arange(first, min(first + CHUNK, size))
            for metric, value in subject.losses(subject.task.load("validation", numbers, None)).items():
                sums[metric] += float(value.double().sum())
    apart = {metric: abs(sums[metric] / size - value) / max(abs(value), 1e-3) for metric, value in found.items()}
    limit = SAME if subject.runtime.accelerator.mixed_precision == "no" else 0.02
    wrong = [metric for metric, distance in apart.items() if not distance <= limit]
    said = [f"{metric} is {number(found[metric])}, over all samples {number(sums[metric] / size)}" for metric in wrong]
    yield judge(
        name,
        not wrong,
        "; ".join(said) if wrong else f"the means over all {size:,} samples of validation",
        "evaluation is the mean over all samples of validation, each with its own label",
        (
            "samples of evaluation get other labels or other preprocessing than they should: see EvaluationLoader",
            "the last, smaller batch weighs as much as the others, or fillers count: see train/engine/evaluation.py",
        ),
        apart=apart,
    )
