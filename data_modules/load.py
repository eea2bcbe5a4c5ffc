"""The front door: what `--dataset` and its companions name becomes splits of samples with labels.

The order is: open the source, choose splits, find the columns, number the labels, cut a validation split if there is
none, fit the preprocessing on what is left to train on, and only then encode all splits with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import xxhash

from data_modules.columns import Columns, find_columns, find_image_column, is_index, refuse_kind
from data_modules.errors import DataError
from data_modules.images import ImagePreprocessing, fit_images
from data_modules.labels import find_class_names, find_twins, has_labels, number_labels
from data_modules.options import DataOptions
from data_modules.points import PointPreprocessing, fit_points
from data_modules.refusals import refuse_for_reconstruction, refuse_options
from data_modules.rows import Rows
from data_modules.source import open_source
from data_modules.splits import (
    DataModule,
    InputSpec,
    Normalization,
    Preprocessing,
    Split,
    measure_normalization,
    scale_only,
)
from data_modules.stratify import stratified_parts
from data_modules.stream import BLOCK, Stream, count_rows, hold
from data_modules.tables import TablePreprocessing, fit_table
from data_modules.text import TextPreprocessing, count_changes, fit_text

SPLIT_SEED = 0  # the cut is part of the data: the same for every seed of a run


def load_data(options: DataOptions, *, labelled: bool = True) -> DataModule:
    """Load a data set.

    Args:
        options: what the user says of it.
        labelled: False for images to be reconstructed: labels do not matter, all are 0, there are no classes, and
            pixels are normalised to [0, 1].

    Raises:
        DataError: it cannot be used; says what, where and what to do.
    """
    from data_modules import embedded, embedded_tables

    if not labelled:
        refuse_for_reconstruction(options)
    embedded_sets: dict[str, Callable[[], DataModule]] = {
        "digits": partial(embedded.load_digits, labelled=labelled),
        "blobs": embedded.load_blobs,
        "breast_cancer": embedded_tables.load_breast_cancer,
        "wine": embedded_tables.load_wine,
    }
    if options.dataset in embedded_sets:
        refuse_options(options, None)
        data = embedded_sets[options.dataset]()
        if not labelled and data.inputs.task != "image":
            refuse_kind(options.dataset, data.inputs.task)
        return data
    return _load_source(options, labelled)


def _load_source(options: DataOptions, labelled: bool) -> DataModule:
    source = options.dataset
    opened = open_source(options)
    names = choose_splits(source, list(opened), options)
    parts = {part: opened[name] for part, name in names.items()}
    whole_train = parts["train"]
    if options.streaming:
        if "validation" not in parts:
            raise DataError(
                f"--streaming: {source} has no validation split, and none is cut from a stream; add one, or name one "
                "with --validation_split"
            )
        parts = {part: hold(rows, BLOCK if part == "train" else None) for part, rows in parts.items()}
    for rows in parts.values():
        if len(rows) == 0:
            raise DataError(f"{source}: split {rows.name!r} has no rows; fill it or remove it")
    columns = (find_columns if labelled else find_image_column)(source, parts["train"], options)
    refuse_options(options, columns.task)
    class_names: list[str] = []
    target = "itself; labels do not matter" if columns.label is None else columns.label
    notes = [f"task {columns.task}: {', '.join(columns.inputs)} to {target}"]
    if columns.label is not None:
        class_names, told = _find_classes(source, parts, columns.inputs, columns.label, options)
        notes += told
    labels = {part: number_labels(rows, columns.label, class_names) for part, rows in parts.items()}

    chosen = parts["train"].good()
    held_out = None
    _check_classes(source, labels["train"][chosen], class_names, columns)
    if "validation" not in parts:
        chosen, held_out = _cut_validation(source, parts["train"], labels["train"], chosen, class_names, options)
        notes.append(
            f"no validation split: {len(held_out):,} of {len(chosen) + len(held_out):,} training samples, "
            f"{'equal class shares' if labelled else 'chosen at random'}, were cut"
        )
    preprocessing, inputs, told = _fit(source, parts["train"], chosen, columns, options)
    notes += told
    splits = _encode(parts, labels, preprocessing, chosen, held_out)
    _check_classes(source, splits["train"].labels, class_names, columns)  # of what is left
    normalization = None
    encode = preprocessing.encode
    if isinstance(preprocessing, ImagePreprocessing):
        encode = preprocessing.encode_later  # of streams
        notes += preprocessing.said
        if labelled:
            normalization = _normalization(source, splits["train"], inputs, options)
        else:
            normalization = scale_only(1 / 255, inputs.shape[0])
    if columns.task == "text":
        for part, split in splits.items():
            of_split = torch.arange(len(split)) if split.rows is None else split.rows
            told = count_changes(split.samples, of_split, options.max_length)  # type: ignore[arg-type]
            notes += [f"{part}: {text}" for text in told]
    stream = None
    if options.streaming:
        stream = Stream(
            whole_train,
            count_rows(whole_train),
            lambda rows: Split(encode(rows), number_labels(rows, columns.label, class_names)),
        )
        notes.append(
            f"streaming {stream.num_samples:,} training samples in blocks of about {BLOCK:,}; what is fitted is fitted "
            "on the first block"
        )
    different = {id(rows): rows for rows in parts.values()}.values()  # one split may serve as two
    skipped = [text for rows in different for text in (*rows.dropped, *rows.bad.values())]
    if skipped:
        notes.append(f"left out {len(skipped):,} bad sample(s), first {skipped[0]}")
    present = set(splits["train"].labels.tolist())
    absent = [name for number, name in enumerate(class_names) if number not in present]
    if absent:
        notes.append(f"{len(absent):,} of {len(class_names):,} classes have no training sample, first {absent[0]!r}")
    return DataModule(
        name=source,
        fingerprint=_fingerprint(splits),
        inputs=inputs,
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        class_names=class_names,
        normalization=normalization,
        preprocessing=preprocessing,
        notes=notes,
        skipped=skipped,
        stream=stream,
    )


def choose_splits(source: str, present: list[str], options: DataOptions) -> dict[str, str]:
    """Return which split of the source serves as train, validation and test."""
    chosen = {"train": options.train_split}
    validation = options.validation_split
    free = set(present) - {options.train_split}  # what is trained on is no measure, unless it is asked for by name
    validation = validation or next((name for name in ("validation", "valid", "val") if name in free), None)
    test = options.test_split or ("test" if "test" in free - {validation} else None)
    if validation is not None:
        chosen["validation"] = validation
    if test is not None:
        chosen["test"] = test
    for part, name in chosen.items():
        if name not in present:
            raise DataError(f"{source}: has no split {name!r}, only {', '.join(present)}; name one with --{part}_split")
    return chosen


def _find_classes(
    source: str, parts: dict[str, Rows], inputs: list[str], label: str, options: DataOptions
) -> tuple[list[str], list[str]]:
    """Return the names of the classes and lines for the user; takes a test split without labels out of `parts`."""
    notes = []
    left = [name for name in parts["train"].data.column_names if is_index(name) and name not in inputs]
    if left:
        notes.append(f"column {left[0]!r} holds row numbers and is left out")
    for part, rows in list(parts.items()):
        if part == "test" and options.test_split is None and not has_labels(rows, label):
            notes.append(f"split {parts.pop(part).name!r} has no labels and is not used")
        elif label not in rows.data.column_names:
            raise DataError(
                f"{source}: split {rows.name!r} has no column {label!r}; its columns are "
                f"{', '.join(rows.data.column_names)}. Name the label with --label_column"
            )
    class_names = find_class_names(source, parts["train"], label)
    return class_names, [*notes, *find_twins(class_names)]


def _check_classes(source: str, labels: torch.Tensor, class_names: list[str], columns: Columns) -> None:
    found = labels.unique()
    if columns.label is not None and len(found) < 2:
        only = f"one class only ({class_names[int(found[0])]!r}" if len(found) else "no usable sample ("
        raise DataError(
            f"{source}: the training split has {only} in column {columns.label!r}); a classifier needs two. Name "
            "another with --label_column"
        )


def _cut_validation(
    source: str, rows: Rows, labels: torch.Tensor, chosen: torch.Tensor, class_names: list[str], options: DataOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows to train on and those to validate on."""
    counts = torch.bincount(labels[chosen], minlength=len(class_names))
    if not class_names and len(chosen) < 2:
        raise DataError(
            f"{source}: the training split has one image, and it takes two to cut a validation split from it; add "
            "images, or name one with --validation_split"
        )
    for number in (counts == 1).nonzero()[:, 0].tolist():
        row = int(chosen[labels[chosen] == number][0])
        rows.reject(row, f"class {class_names[number]!r} has this one sample only, to train and to validate on")
    chosen = rows.good()
    if not len(chosen):
        raise DataError(
            f"{source}: no class has the two samples that it takes to cut a validation split from the training split; "
            "name one with --validation_split"
        )
    fraction = options.validation_fraction
    kept, cut = stratified_parts(labels[chosen], (1 - fraction, fraction), SPLIT_SEED)
    return chosen[kept], chosen[cut]


def _fit(
    source: str, rows: Rows, chosen: torch.Tensor, columns: Columns, options: DataOptions
) -> tuple[Preprocessing, InputSpec, list[str]]:
    """Fit the preprocessing on the rows that are trained on."""
    fitted: Any
    if columns.task == "image":
        fitted, notes = fit_images(source, rows, chosen, columns.inputs, options)
    elif columns.task == "text":
        fitted, notes = fit_text(rows, chosen, columns.inputs[0], options)
    elif columns.task == "points":
        fitted, notes = fit_points(rows, chosen, columns.inputs[0]), []
    else:
        fitted, notes = fit_table(rows, chosen, columns.inputs, options.categorical_columns)
    return fitted, fitted.input_spec, notes


def _encode(
    parts: dict[str, Rows],
    labels: dict[str, torch.Tensor],
    preprocessing: Preprocessing,
    chosen: torch.Tensor,
    held_out: torch.Tensor | None,
) -> dict[str, Split]:
    """Encode all splits, and leave rejected rows out."""
    splits = {}
    for part, rows in parts.items():
        samples = preprocessing.encode(rows)
        good = rows.good()
        if not len(good):
            raise DataError(f"split {rows.name!r} has no usable sample left, of {len(rows):,}")
        if part == "train" and held_out is not None:
            sound = torch.zeros(len(rows), dtype=torch.bool)
            sound[good] = True
            for name, members in (("train", chosen), ("validation", held_out)):
                left = members[sound[members]]
                if not len(left):
                    raise DataError(f"split {rows.name!r} has no usable sample left for {name}, of {len(members):,}")
                splits[name] = Split(samples, labels["train"][left], left)
        elif len(good) == len(rows):
            splits[part] = Split(samples, labels[part])
        else:
            splits[part] = Split(samples, labels[part][good], good)
    return splits


def _normalization(source: str, train: Split, inputs: InputSpec, options: DataOptions) -> Normalization:
    """Return mean and spread of the channels, as given or else as measured on the training split."""
    if not options.image_mean:
        moments_NC2: torch.Tensor = train.samples.measured_NC3[..., :2]  # type: ignore[attr-defined]
        moments_NC2 = moments_NC2 if train.rows is None else moments_NC2[train.rows]
        return measure_normalization(moments_NC2, inputs.shape[1] * inputs.shape[2], scale=1 / 255)
    if len(options.image_mean) != inputs.shape[0]:
        raise DataError(
            f"--image_mean: {len(options.image_mean)} value(s) for images of {inputs.shape[0]} channel(s) in {source}"
        )
    return Normalization(1 / 255, options.image_mean, options.image_std)


def restore_preprocessing(description: dict[str, Any]) -> Preprocessing:
    """Make a run's preprocessing again from what `DataModule.describe_preprocessing` returned."""
    kinds: dict[str, Any] = {
        "image": ImagePreprocessing,
        "points": PointPreprocessing,
        "table": TablePreprocessing,
        "text": TextPreprocessing,
    }
    restored: Preprocessing = kinds[description["task"]].from_description(description["fitted"])
    return restored


def _fingerprint(splits: dict[str, Split]) -> str:
    """Return a checksum of what is trained and validated on; the test split has no part in training."""
    digest = xxhash.xxh3_128()
    for part in ("train", "validation"):
        split = splits[part]
        digest.update(split.samples.fingerprint().encode())
        digest.update(split.labels.numpy().data)
        if split.rows is not None:
            digest.update(split.rows.numpy().data)
    return digest.hexdigest()
