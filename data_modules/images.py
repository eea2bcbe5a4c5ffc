"""Labelled images from anything that Hugging Face `datasets` opens: hub ids, Parquet files, image folders."""

from __future__ import annotations

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
            class. Says which, and what there is.
    """
    splits = _open(source)
    names = _choose_splits(source, list(splits), columns)
    first = splits[names["train"]]
    image_column = columns.image or _find_image_column(source, first)
    label_column = columns.label or _find_label_column(source, first, image_column)
    for name in set(names.values()):
        for column in (image_column, label_column):
            if column not in splits[name].column_names:
                raise DataError(
                    f"{source}: split {name!r} has no column {column!r}; its columns are "
                    f"{', '.join(splits[name].column_names)}. Name them with --image_column and --label_column"
                )
    class_names = _class_names(source, first, label_column)
    encoded = {part: _image_bytes(source, splits[name], image_column) for part, name in names.items()}
    labels = {part: _labels(source, splits[name], name, label_column, class_names) for part, name in names.items()}
    if len(labels["train"].unique()) < 2:
        only = class_names[int(labels["train"][0])] if len(labels["train"]) else "none"
        raise DataError(f"{source}: the training split has one class only ({only!r} in column {label_column!r})")

    mode = color_mode(encoded["train"][:256])
    parts = {
        part: Split(_decode_split(encoded[part], mode, columns.image_size, f"{source}, {name}", in_memory), labels[part])
        for part, name in names.items()
    }
    notes = []
    if "validation" not in parts:
        kept, cut = stratified_parts(
            labels["train"], (1 - columns.validation_fraction, columns.validation_fraction), SPLIT_SEED
        )
        whole = parts["train"]
        parts["train"], parts["validation"] = take(whole, kept), take(whole, cut)
        notes.append(f"no validation split: {len(cut)} of {len(whole)} training samples, equal class shares, were cut")
    shapes = {tuple(split.inputs.shape[1:]) for split in parts.values()}
    if len(shapes) > 1:
        raise DataError(f"{source}: the splits have images of different sizes {sorted(shapes)}; give --image_size")
    return DataModule(
        name=source,
        fingerprint=_fingerprint(encoded, labels, columns),
        train=parts["train"],
        validation=parts["validation"],
        test=parts.get("test"),
        class_names=class_names,
        normalization=measure_normalization(parts["train"], scale=1 / 255),
        notes=notes,
    )


def _fingerprint(encoded: dict[str, list[bytes]], labels: dict[str, torch.Tensor], columns: ImageColumns) -> str:
    digest = xxhash.xxh3_128(repr((columns.validation_fraction, columns.image_size)).encode())
    for part in sorted(encoded.keys() - {"test"}):
        for image in encoded[part]:
            digest.update(image)
        digest.update(labels[part].numpy())
    return digest.hexdigest()


def take(split: Split, indices: torch.Tensor) -> Split:
    """Return the part of a split that holds the samples at `indices`."""
    inputs = split.inputs
    if isinstance(inputs, EncodedImages):
        chosen = [inputs.encoded[i] for i in indices.tolist()]
        return Split(replace(inputs, encoded=chosen, shape=(len(chosen), *inputs.shape[1:])), split.labels[indices])
    return Split(inputs[indices], split.labels[indices])


def _open(source: str) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
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
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "the folder" if path.exists() else "no embedded data set, no path and, on the hub,"
        raise DataError(
            f"--dataset {source}: {where} cannot be opened: {first_line}. Embedded: digits, blobs. Otherwise give a "
            "folder of images, a .parquet file or folder, or a hub id"
        ) from error


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
            raise DataError(
                f"{source}: has no split {name!r}, only {', '.join(present)}; name one with --{part}_split"
            )
    return chosen


def _find_image_column(source: str, split: Any) -> str:
    found = [name for name, feature in split.features.items() if type(feature).__name__ == "Image"]
    if len(found) != 1:
        problem = f"more than one image column ({', '.join(found)})" if found else "no image column"
        raise DataError(
            f"{source}: {problem} among {', '.join(split.column_names)}; name it with --image_column"
        )
    return found[0]


def _find_label_column(source: str, split: Any, image_column: str) -> str:
    classes = [name for name, feature in split.features.items() if type(feature).__name__ == "ClassLabel"]
    usual = [name for name in ("label", "labels", "target", "class") if name in split.column_names]
    for found in (classes, usual):
        if len(found) == 1:
            return found[0]
    rest = [name for name in split.column_names if name != image_column]
    raise DataError(f"{source}: which of the columns {', '.join(rest) or '(none)'} is the label? --label_column NAME")


def _class_names(source: str, split: Any, label_column: str) -> list[str]:
    feature = split.features[label_column]
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names)
    values = split.unique(label_column)
    if any(value is None for value in values):
        raise DataError(f"{source}: column {label_column!r} has missing labels; remove those rows")
    if all(isinstance(value, int) for value in values):
        if min(values) < 0:
            row = split[label_column].index(min(values))
            raise DataError(f"{source}: label {min(values)} in row {row} of {label_column!r}: labels count from 0")
        return [str(number) for number in range(max(values) + 1)]
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    raise DataError(f"{source}: column {label_column!r} holds {type(values[0]).__name__}; labels are whole numbers or text")


def _labels(source: str, split: Any, name: str, column: str, class_names: list[str]) -> torch.Tensor:
    number = {text: position for position, text in enumerate(class_names)}
    numbers = []
    for row, value in enumerate(split.with_format(None)[column]):
        label = number.get(value, -1) if isinstance(value, str) else value
        if not isinstance(label, int) or not 0 <= label < len(class_names):
            raise DataError(
                f"{source}: label {value!r} in row {row} of split {name!r}, column {column!r}, is out of range: there "
                f"are {len(class_names)} classes, {class_names[0]!r} to {class_names[-1]!r}"
            )
        numbers.append(label)
    return torch.tensor(numbers, dtype=torch.int64)


def _image_bytes(source: str, split: Any, column: str) -> list[bytes]:
    import datasets

    if type(split.features[column]).__name__ != "Image":
        raise DataError(f"{source}: column {column!r} holds no images; name another with --image_column")
    rows = split.cast_column(column, datasets.Image(decode=False))[column]
    return [row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes() for row in rows]


def _decode_split(
    encoded: list[bytes], mode: str, image_size: int | None, where: str, in_memory: bool
) -> torch.Tensor | EncodedImages:
    if not encoded:
        raise DataError(f"{where}: the split has no rows")
    shape = decode(encoded[0], mode, image_size, f"{where}, row 0").shape
    if not in_memory:
        return EncodedImages(encoded, mode, image_size, (len(encoded), *shape))
    images_NCHW = torch.empty((len(encoded), *shape), dtype=torch.uint8)
    for row, data in enumerate(encoded):
        image = decode(data, mode, image_size, f"{where}, row {row}")
        if image.shape != shape:
            raise DataError(
                f"{where}: row {row} is {image.shape[1]} x {image.shape[2]} pixels, row 0 {shape[1]} x {shape[2]}; "
                "give --image_size N to scale all to N x N"
            )
        images_NCHW[row] = image
    return images_NCHW

