"""Flags that say nothing about the samples at hand are refused, not ignored."""

from __future__ import annotations

import dataclasses

from data_modules.errors import DataError
from data_modules.options import DataOptions, Task


def refuse_for_reconstruction(options: DataOptions) -> None:
    """Refuse what says nothing about images without labels, or would take their pixels out of [0, 1]."""
    reasons = {
        "label_column": "reconstruction uses no labels",
        "image_mean": "reconstruction needs pixels in [0, 1]",
        "image_std": "reconstruction needs pixels in [0, 1]",
    }
    for name, reason in reasons.items():
        if getattr(options, name):
            raise DataError(f"--{name}: {reason}; leave it out")
    if options.task not in ("auto", "image"):
        raise DataError(f"--task {options.task}: reconstruction needs images; leave it out")


def refuse_options(options: DataOptions, task: Task | None) -> None:
    """Refuse what says nothing about samples of a task; None stands for the embedded sets, which are as they are."""
    meant_for: dict[Task, tuple[str, ...]] = {
        "image": ("image_size", "image_mean", "image_std"),
        "text": ("tokenizer", "vocab_size", "min_count", "max_length"),
        "table": ("categorical_columns",),
    }
    for field in dataclasses.fields(DataOptions):
        given = getattr(options, field.name) != field.default
        if task is None and field.name != "dataset":
            others, what = ["files and hub ids"], f"{options.dataset} is embedded"
        else:
            others = [kind for kind, names in meant_for.items() if field.name in names and kind != task]
            what = f"the samples are of the kind {task}"
        if given and others:
            raise DataError(f"--{field.name}: is for {others[0]}, and {what}; leave it out")
