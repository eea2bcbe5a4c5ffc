"""Evaluation: gives the same answer when asked again, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from train.engine.checks.finding import Finding, judge, number
from train.engine.checks.subject import Subject

SAMPLES = 64
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
