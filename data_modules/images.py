"""Labelled images from anything that Hugging Face `datasets` opens: hub ids, Parquet files, image folders."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from data_modules.decoding import EncodedImages, color_mode, decode
from data_modules.errors import DataError
from data_modules.splits import DataModule, Split, measure_normalization
from data_modules.stratify import stratified_parts

SPLIT_SEED = 0  # the cut is part of the data: the same for every seed of a run


@dataclass(frozen=True)
class ImageColumns:
    """What the user said of a data set; None means: find out."""

    image: str | None = None
    label: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    validation_fraction: float = 0.1
    image_size: int | None = None


def load_images(source: str, columns: ImageColumns, *, in_memory: bool) -> DataModule:
    """Open a data set, find its columns and splits, and check every label.

    Args:
        source: hub id, or path of a folder or file.
        columns: what is known of columns and splits.
        in_memory: decode everything now; otherwise each time a sample is gathered.

    Raises:
        DataError: no such data set, column or split; an image that cannot be read; a label out of range or only one
            class; a size or share that makes no sense. Says which, and what there is.
    """
    if columns.image_size is not None and columns.image_size < 1:
        raise DataError(f"--image_size {columns.image_size}: must be 1 or more")
    if not 0 < columns.validation_fraction < 1:
        raise DataError(f"--validation_fraction {columns.validation_fraction}: must be above 0 and below 1")
    splits = _open(source)
    names = _choose_splits(source, list(splits), columns)
    for name in names.values():
        if len(splits[name]) == 0:
            raise DataError(f"{source}: split {name!r} has no rows; fill it or remove it")
    notes = []
    first = splits[names["train"]]
    image_column = columns.image or _find_image_column(source, first)
    label_column = columns.label or _find_label_column(source, first, image_column)
    for name in names.values():
        for column in (image_column, label_column):
            if column not in splits[name].column_names:
                raise DataError(
                    f"{source}: split {name!r} has no column {column!r}; its columns are "
                    f"{', '.join(splits[name].column_names)}. Name them with --image_column and --label_column"
                )
    class_names = _class_names(source, first, label_column)
    if "test" in names and columns.test is None and not _has_labels(splits[names["test"]], label_column):
        notes.append(f"split {names.pop('test')!r} has no labels and is not used")
    images = {part: _read_images(source, splits[name], name, image_column) for part, name in names.items()}
    labels = {part: _labels(source, splits[name], name, label_column, class_names) for part, name in names.items()}
    if len(labels["train"].unique()) < 2:
        only = class_names[int(labels["train"][0])]
        raise DataError(
            f"{source}: the training split has one class only ({only!r} in column {label_column!r}); a classifier "
            "needs two. Name another column with --label_column"
        )

    mode = color_mode([image.encoded for image in images["train"]])
    parts = {
        part: Split(_decode_split(images[part], mode, columns.image_size, in_memory), labels[part]) for part in names
    }
    if "validation" not in parts:
        kept, cut = stratified_parts(
            labels["train"], (1 - columns.validation_fraction, columns.validation_fraction), SPLIT_SEED
        )
        if not len(cut):
            raise DataError(
                f"{source}: no class has the two samples that it takes to cut a validation split from the training "
                "split; name one with --validation_split"
            )
        whole = parts["train"]
        parts["train"], parts["validation"] = take(whole, kept), take(whole, cut)
        notes.append(f"no validation split: {len(cut)} of {len(whole)} training samples, equal class shares, were cut")
    shapes = {tuple(split.inputs.shape[1:]) for split in parts.values()}
    if len(shapes) > 1:
        found = " and ".join(f"{height} x {width}" for _, height, width in sorted(shapes))
        raise DataError(
            f"{source}: the splits have images of different sizes, {found} pixels (height x width); give --image_size "
            "N to scale all to N x N"
        )
    absent = sorted(set(range(len(class_names))) - set(parts["train"].labels.tolist()))
    if absent:
        notes.append(
            f"{len(absent):,} of {len(class_names):,} classes have no training sample, first {class_names[absent[0]]!r}"
        )
    return DataModule(
        name=source,
        fingerprint=_fingerprint(images, labels, columns),
        train=parts["train"],
        validation=parts["validation"],
        test=parts.get("test"),
        class_names=class_names,
        normalization=measure_normalization(parts["train"], scale=1 / 255),
        notes=notes,
    )


def _fingerprint(images: dict[str, list[_Image]], labels: dict[str, torch.Tensor], columns: ImageColumns) -> str:
    digest = xxhash.xxh3_128(repr((columns.validation_fraction, columns.image_size)).encode())
    for part in sorted(images.keys() - {"test"}):
        for image in images[part]:
            digest.update(image.encoded)
        digest.update(labels[part].numpy().data)
    return digest.hexdigest()


def take(split: Split, indices: torch.Tensor) -> Split:
    """Return the part of a split that holds the samples at `indices`."""
    inputs = split.inputs
    if isinstance(inputs, EncodedImages):
        encoded = [inputs.encoded[i] for i in indices.tolist()]
        names = [inputs.names[i] for i in indices.tolist()]
        shape = (len(encoded), *inputs.shape[1:])
        return Split(replace(inputs, encoded=encoded, names=names, shape=shape), split.labels[indices])
    return Split(inputs[indices], split.labels[indices])


def _open(source: str) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    wanted = "Embedded: digits, blobs. Otherwise give a folder of images, a .parquet file or folder, or a hub id"
    if not source.strip():
        raise DataError(f"--dataset: is empty. {wanted}")
    if path.exists() and any(sign in source for sign in "[*?"):
        raise DataError(f"--dataset {source}: `datasets` takes [, * and ? in a path for a pattern; rename it")
    try:
        if path.is_file():
            kind = {".parquet": "parquet"}.get(path.suffix.lower())
            if kind is None:
                raise DataError(f"{source}: cannot open files of this kind; give a .parquet file or a folder of images")
            return dict(datasets.load_dataset(kind, data_files=source))
        if path.exists():
            return dict(datasets.load_dataset(source))
        if source.count("/") > 1 or source.startswith((".", "/", "~")):
            raise DataError(f"--dataset {source}: no such file or folder")
        return dict(datasets.load_dataset(source))
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds for the same thing: it cannot be opened
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = (str(cause or error).strip().splitlines() or [type(error).__name__])[0].rstrip(".!")
        # What it says of Parquet files without a group of rows, and with a group without rows.
        empty = re.search("Instruction (.+) corresponds to no data|BatchSize must be greater than 0", reason)
        if empty:
            what = f"split {empty[1]}" if empty[1] else "a Parquet file"
            raise DataError(f"{source}: {what} has no rows; fill it or remove it") from error
        if path.exists():
            raise DataError(f"--dataset {source}: cannot be opened: {reason}. {wanted}") from error
        raise DataError(f"--dataset {source}: is no path, and on the hub: {reason}. {wanted}") from error


def _choose_splits(source: str, present: list[str], columns: ImageColumns) -> dict[str, str]:
    """Return which split of the source serves as train, validation and test."""
    chosen = {"train": columns.train}
    validation = columns.validation or next((name for name in ("validation", "valid", "val") if name in present), None)
    test = columns.test or ("test" if "test" in present else None)
    if validation is not None:
        chosen["validation"] = validation
    if test is not None:
        chosen["test"] = test
    for part, name in chosen.items():
        if name not in present:
            raise DataError(f"{source}: has no split {name!r}, only {', '.join(present)}; name one with --{part}_split")
    return chosen


def _find_image_column(source: str, split: Any) -> str:
    found = [name for name, feature in split.features.items() if _holds_images(feature)]
    if len(found) != 1:
        problem = f"more than one image column ({', '.join(found)})" if found else "no image column"
        raise DataError(f"{source}: {problem} among {', '.join(split.column_names)}; name it with --image_column")
    return str(found[0])


def _holds_images(feature: Any) -> bool:
    """Say whether a column holds images, also where the file was written by other tools than `datasets`."""
    as_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or as_struct or getattr(feature, "dtype", None) == "binary"


def _find_label_column(source: str, split: Any, image_column: str) -> str:
    classes = [name for name, feature in split.features.items() if type(feature).__name__ == "ClassLabel"]
    usual = [name for name in ("label", "labels", "target", "class") if name in split.column_names]
    for found in (classes, usual):
        if len(found) == 1:
            return found[0]
    rest = [name for name in split.column_names if name != image_column]
    if not rest:
        raise DataError(f"{source}: has no labels; in a folder of images, each class is a folder of its own")
    raise DataError(f"{source}: which of the columns {', '.join(rest)} is the label? Name it with --label_column")


def _class_names(source: str, split: Any, label_column: str) -> list[str]:
    feature = split.features[label_column]
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names)
    if type(feature).__name__ != "Value":
        raise DataError(f"{source}: column {label_column!r} holds no labels; name another with --label_column")
    values = [value for value in split.unique(label_column) if value is not None]
    if not values:
        raise DataError(
            f"{source}: all labels in column {label_column!r} are missing; name another with --label_column"
        )
    if all(isinstance(value, int) for value in values):
        if min(values) < 0:
            row = split[label_column].index(min(values))
            raise DataError(
                f"{source}: label {min(values)} in row {row}, column {label_column!r}, is below 0; labels count from "
                "0. Correct or remove that row"
            )
        return [str(number) for number in range(max(values) + 1)]
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    raise DataError(
        f"{source}: column {label_column!r} holds {feature.dtype}; labels are whole numbers or text. Name another with "
        "--label_column"
    )


def _has_labels(split: Any, label_column: str) -> bool:
    """Return False where all labels are left out, as test splits on the hub do, by -1."""
    return not set(split.unique(label_column)) <= {None, -1}


def _labels(source: str, split: Any, name: str, column: str, class_names: list[str]) -> torch.Tensor:
    number = {text: position for position, text in enumerate(class_names)}
    numbers = []
    for row, value in enumerate(split.with_format(None)[column]):
        label = number.get(value, -1) if isinstance(value, str) else value
        if not isinstance(label, int) or not 0 <= label < len(class_names):
            problem = (
                "is missing"
                if value is None
                else f"is none of the {len(class_names)} classes {class_names[0]!r} to {class_names[-1]!r}"
            )
            raise DataError(
                f"{source}: label {value!r} in row {row} of split {name!r}, column {column!r}, {problem}. Correct or "
                "remove that row"
            )
        numbers.append(label)
    return torch.tensor(numbers, dtype=torch.int64)


@dataclass(frozen=True)
class _Image:
    """A compressed image, and what to call it in a message."""

    encoded: bytes
    name: str


def _read_images(source: str, split: Any, name: str, column: str) -> list[_Image]:
    import datasets

    feature = split.features[column]
    if not _holds_images(feature):
        raise DataError(f"{source}: column {column!r} holds no images; name another with --image_column")
    images = []
    for number, row in enumerate(split.cast_column(column, datasets.Image(decode=False))[column]):
        where = f"{source}, split {name!r}, row {number}"
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise DataError(f"{where}: has no image; remove that row")
        encoded = row["bytes"]
        if encoded is None:
            where = f"{where} ({row['path']})"
            try:
                encoded = Path(row["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{where}: cannot be read ({error.strerror})") from error
        images.append(_Image(encoded, where))
    return images


def _decode_split(
    images: list[_Image], mode: str, image_size: int | None, in_memory: bool
) -> torch.Tensor | EncodedImages:
    shape = decode(images[0].encoded, mode, image_size, images[0].name).shape
    encoded, names = [image.encoded for image in images], [image.name for image in images]
    lazy = EncodedImages(encoded, names, mode, image_size, (len(images), *shape))
    if not in_memory:
        return lazy
    images_NCHW = torch.empty(lazy.shape, dtype=torch.uint8)
    for row in range(len(images)):
        images_NCHW[row] = lazy.decode(row)
    return images_NCHW
