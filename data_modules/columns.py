"""Which columns hold the samples and the labels, and so what kind of task it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from data_modules.errors import DataError
from data_modules.options import DataOptions, Task
from data_modules.rows import Rows

LABEL_NAMES = ("label", "labels", "target", "class")
WORDS_OF_A_TEXT = 4  # a column whose cells have fewer words on average holds categories


@dataclass(frozen=True)
class Columns:
    """What the columns of a data set are for."""

    task: Task
    inputs: list[str]
    label: str | None  # None: labels do not matter


def find_columns(source: str, rows: Rows, options: DataOptions) -> Columns:
    """Find out what the user has not said.

    Raises:
        DataError: a named column does not exist or is of the wrong type, or there is more than one way to read the
            data; says which columns there are and which flag decides.
    """
    names = rows.data.column_names
    _check_names(source, names, (*options.input_columns, *options.categorical_columns, options.label_column))
    kinds = {name: _kind(rows, name) for name in names}
    label = options.label_column or _find_label(source, rows, kinds, options)
    inputs = list(options.input_columns) or [name for name in names if name != label and not is_index(name)]
    if label in inputs:
        raise DataError(
            f"{source}: column {label!r} is the label and cannot be an input; name another with --label_column"
        )
    of_kind = {kind: [name for name in inputs if kinds[name] == kind] for kind in ("image", "points", "text")}
    task = options.task
    if task == "auto":
        task = next((kind for kind in ("image", "points") if of_kind[kind]), "table")
        if task == "table" and of_kind["text"]:
            if len(inputs) > 1:
                text = of_kind["text"][0]
                others = ", ".join(name for name in inputs if name != text)
                raise DataError(
                    f"{source}: column {text!r} holds text, and there is {others} besides. For the text alone: --task "
                    f"text --input_columns {text}. As a table: --task table, with the columns to use in --input_columns"
                )
            task = "text"
    if task == "table":
        return Columns("table", inputs, label)
    fitting = of_kind["text"] if task == "text" else of_kind[task]
    if task == "text" and not fitting:
        fitting = [name for name in inputs if kinds[name] == "category"]
    if len(fitting) != 1:
        what = {"image": "image", "points": "column with lists of numbers", "text": "text"}[task]
        problem = f"more than one {what} column ({', '.join(fitting)})" if fitting else f"no {what} column"
        raise DataError(f"{source}: {problem} among {', '.join(inputs)}; name it with --input_columns")
    return Columns(task, fitting, label)  # type: ignore[arg-type]


def find_image_column(source: str, rows: Rows, options: DataOptions) -> Columns:
    """Find the column of images, for a task to which labels and other columns do not matter.

    Raises:
        DataError: there is no such column, or more than one; says what there is and what to do.
    """
    names = rows.data.column_names
    _check_names(source, names, options.input_columns)
    images = [name for name in names if holds_images(rows.data.features[name])]
    if not images:
        kinds = {_kind(rows, name) for name in names}
        refuse_kind(source, next((kind for kind in ("text", "points") if kind in kinds), "table"))
    chosen = list(options.input_columns) or images
    if len(chosen) > 1:
        raise DataError(
            f"{source}: reconstruction takes one image column, not {', '.join(chosen)}; name one with --input_columns"
        )
    return Columns("image", chosen, None)


def refuse_kind(source: str, kind: str) -> NoReturn:
    """Refuse samples that are no images where images are to be reconstructed.

    Raises:
        DataError: always.
    """
    held = {"text": "text", "points": "lists of numbers"}.get(kind, "a table")
    raise DataError(
        f"{source}: holds {held}; reconstruction needs images. Give digits, a folder of images, or files or a hub id "
        "with a column of images"
    )


def _check_names(source: str, names: list[str], wanted: Iterable[str | None]) -> None:
    for name in wanted:
        if name is not None and name not in names:
            raise DataError(f"{source}: has no column {name!r}; its columns are {', '.join(names)}")


def is_index(name: str) -> bool:
    """Say whether a column is what pandas writes of row numbers; in a file that is sorted they give the label away."""
    return re.fullmatch(r"(Unnamed: \d+|__index_level_\d+__)?", name) is not None


def _kind(rows: Rows, name: str) -> str:
    feature = rows.data.features[name]
    if holds_images(feature):
        return "image"
    if isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence", "Array2D"):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        number = str(getattr(inner, "dtype", "")).startswith(("int", "uint", "float"))
        return "points" if number else "other"
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        # Some of them, at equal distances: files are often sorted.
        column = rows.data.select_columns([name])  # a row of all columns would decode its image
        cells = [cell for cell in column[:: max(1, len(rows) // 256)][name] if cell]
        words = sum(len(cell.split()) for cell in cells) / max(1, len(cells))
        return "text" if words >= WORDS_OF_A_TEXT else "category"
    return "number"


def holds_images(feature: Any) -> bool:
    """Say whether a column holds images, also where the file was written by other tools than `datasets`."""
    as_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return (
        type(feature).__name__ == "Image" or as_struct or getattr(feature, "dtype", None) in ("binary", "large_binary")
    )


def _find_label(source: str, rows: Rows, kinds: dict[str, str], options: DataOptions) -> str:
    rest = [name for name in rows.data.column_names if name not in options.input_columns]
    classes = [name for name in rest if type(rows.data.features[name]).__name__ == "ClassLabel"]
    usual = [name for name in LABEL_NAMES if name in rest]
    for found in (classes, usual):
        if len(found) == 1:
            return found[0]
    rest = [name for name in rest if kinds[name] != "image"]
    if not rest:
        raise DataError(
            f"{source}: has no labels; in a folder of images, each class is a folder of its own, all at one depth, "
            "with no image outside them"
        )
    raise DataError(f"{source}: which of the columns {', '.join(rest)} is the label? Name it with --label_column")
