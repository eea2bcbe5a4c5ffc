"""Labels: inside the classes, of more than one, and spread alike over the splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from train.engine.checks.finding import Finding, judge, skip
from train.engine.checks.reading import Limit, list_numbers, on_main, read
from train.engine.checks.subject import Subject

IMBALANCE = 20  # largest class in terms of the smallest
SHARES_APART = 0.3  # total variation distance of two splits' classes
LABELS = {"quick": Limit(2000, 32 * 2**20, 0.5), "full": Limit(50_000, 2**33, 60)}


def check_labels(subject: Subject) -> Iterator[Finding]:
    """Look at the labels of both splits, if there are classes."""
    if subject.task.num_classes is None or not subject.task.targets:
        yield skip("labels", "the task has no classes")
        return
    yield from on_main(subject, lambda: [_judge_labels(subject, subject.task.num_classes or 0)])


def _judge_labels(subject: Subject, num_classes: int) -> Finding:
    name = subject.task.targets[0]
    labels: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for split in ("train", "validation"):
        parts = [(part, batch[name].cpu()) for part, batch in read(subject, split, LABELS)]
        numbers[split] = torch.cat([part for part, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        labels[split] = torch.cat([values for _, values in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        if labels[split].is_floating_point() or labels[split].ndim != 1:
            return skip("labels", f"{name} are no class numbers: {labels[split].dtype} {list(labels[split].shape)}")
    wrong = {
        split: numbers[split][(values < 0) | (values >= num_classes)].sort().values.tolist()
        for split, values in labels.items()
    }
    counts = {
        split: torch.bincount(values[(values >= 0) & (values < num_classes)], minlength=num_classes)
        for split, values in labels.items()
    }
    failures = _find_label_failures(wrong, counts, num_classes)
    doubts = _find_label_doubts(subject, counts, num_classes)
    said = [f"{len(values):,} of {len(subject.task.splits[split]):,} in {split}" for split, values in labels.items()]
    sizes = counts["train"][counts["train"] > 0]
    if len(sizes):
        said.append(f"{len(sizes)} of {num_classes} classes, with {int(sizes.min()):,} to {int(sizes.max()):,} each")
    problems = failures + doubts
    return judge(
        "labels",
        not problems,
        "; ".join(said + [text for text, _ in problems]),
        f"numbers from 0 to {num_classes - 1}, every class there, in like shares",
        tuple(cause for _, cause in problems),
        otherwise="fail" if failures else "warn",
        counts={split: values.tolist()[:1000] for split, values in counts.items()},
        outside={split: places[:100] for split, places in wrong.items()},
    )


def _find_label_failures(
    wrong: Mapping[str, list[int]], counts: Mapping[str, torch.Tensor], num_classes: int
) -> list[tuple[str, str]]:
    """Return what is wrong for certain, each with a likely cause."""
    problems = [
        (
            f"{len(places)} of {split} lie outside: number {list_numbers(places)}",
            f"labels count from 1, or -1 stands for a missing one, or the model has too few classes ({num_classes})",
        )
        for split, places in wrong.items()
        if places
    ]
    if num_classes > 1 and int((counts["train"] > 0).sum()) == 1 and int(counts["train"].sum()) > 1:
        cause = "the data are sorted and only the first part was read, or --label_column names another column"
        problems.append((f"all training samples are of class {int(counts['train'].argmax())}", cause))
    return problems


def _find_label_doubts(subject: Subject, counts: Mapping[str, torch.Tensor], num_classes: int) -> list[tuple[str, str]]:
    """Return what is worth a look, each with a likely cause."""
    train, validation = counts["train"], counts["validation"]
    total = {split: int(values.sum()) for split, values in counts.items()}
    sizes = train[train > 0]
    problems = []
    # Of a part of the split, rare classes may be missing by chance.
    if total["train"] >= min(len(subject.task.splits["train"]), 50 * num_classes):
        missing = torch.nonzero(train == 0).flatten().tolist()
        if missing and len(sizes) > 1:
            cause = "classes that were never collected, or a cut by class: mend the split, or leave them out"
            problems.append((f"no training sample of class {list_numbers(missing)}", cause))
    balanced = getattr(subject.settings, "class_balance", "none") != "none"
    if len(sizes) > 1 and int(sizes.max()) >= IMBALANCE * int(sizes.min()) and not balanced:
        problems.append(
            (
                f"the largest class has {int(sizes.max()) / int(sizes.min()):.0f} times the samples of the smallest",
                "rare classes are hardly learnt, and accuracy hides it: --class_balance weights or sampler",
            )
        )
    if num_classes > 1 and int((validation > 0).sum()) == 1 and len(sizes) > 1 and total["validation"] > 1:
        cause = "the data are sorted and were cut at the end: shuffle them before they are cut"
        problems.append((f"all validation samples are of class {int(validation.argmax())}", cause))
    elif min(total.values()) >= 10 * num_classes:
        apart = float((train / total["train"] - validation / total["validation"]).abs().sum()) / 2
        if apart > SHARES_APART:
            cause = "the splits come from other sources, or were cut by class: cut one split at random"
            problems.append((f"{apart:.0%} of the class shares differ between train and validation", cause))
    return problems
