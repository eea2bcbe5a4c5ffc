"""Labels of any kind to class numbers and names."""

from __future__ import annotations

from typing import Any

import torch

from data_modules.errors import DataError
from data_modules.rows import Rows

MOST_CLASSES = 1_000_000  # a column with larger numbers holds something else, such as keys


MISSING = "is missing (in text files NA, None, null and ? count as missing: rename a class of that name)"


def find_class_names(source: str, rows: Rows, column: str) -> list[str]:
    """Return the names of the classes in the training split, in the order of their numbers.

    Class labels of `datasets` keep their names. Whole numbers from 0 on are class numbers. Other numbers, text and
    truth values are sorted.

    Raises:
        DataError: the column holds no labels.
    """
    feature = rows.data.features[column]
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names)
    if type(feature).__name__ != "Value":
        raise DataError(f"{source}: column {column!r} holds no labels; name another with --label_column")
    values = [_trimmed(value) for value in rows.data.unique(column)]
    values = [value for value in values if value is not None and value == value]  # NaN is no label
    if not values:
        raise DataError(f"{source}: all labels in column {column!r} are missing; name another with --label_column")
    if all(isinstance(value, float) and value.is_integer() for value in values):  # as pandas writes gaps
        values = [int(value) for value in values]
    if all(isinstance(value, bool) for value in values) or all(isinstance(value, str) for value in values):
        return [str(value) for value in sorted(set(values))]
    if not all(isinstance(value, int) for value in values):
        raise DataError(
            f"{source}: column {column!r} holds {feature.dtype}; labels are whole numbers or text. Name another with "
            "--label_column"
        )
    if min(values) == 0:
        if max(values) >= MOST_CLASSES:
            raise DataError(
                f"{source}: column {column!r} holds numbers up to {max(values)}, which are no class numbers; "
                "name another with --label_column"
            )
        return [str(number) for number in range(max(values) + 1)]
    if min(values) == -1 and len(values) > 2:
        row = rows.column(column).to_pylist().index(-1)
        raise DataError(
            f"{rows.where(row)}: label -1 in column {column!r} is below 0; labels count from 0. Correct or remove "
            "that row"
        )
    return [str(value) for value in sorted(values)]


def find_twins(class_names: list[str]) -> list[str]:
    """Return a warning for classes whose names differ only in case."""
    seen: dict[str, str] = {}
    lines = []
    for name in class_names:
        other = seen.setdefault(name.casefold(), name)
        if other is not name:
            lines.append(f"warning: classes {other!r} and {name!r} differ only in case; is that one class?")
    return lines


def has_labels(rows: Rows, column: str) -> bool:
    """Return False where all labels are left out, as test splits do: no such column, or all are missing or -1."""
    return column in rows.data.column_names and not set(rows.data.unique(column)) <= {None, -1}


def number_labels(rows: Rows, column: str | None, class_names: list[str]) -> torch.Tensor:
    """Return class numbers, int64 [N]; rows without a known label are rejected and hold 0; without a column, all 0."""
    if column is None:
        return torch.zeros(len(rows), dtype=torch.int64)
    feature = rows.data.features[column]
    named = {name: number for number, name in enumerate(class_names)}
    numbered = type(feature).__name__ == "ClassLabel"
    numbers = [0] * len(rows)
    values = rows.column(column).to_pylist()
    number_of = {value: _number(value, named, len(class_names), numbered) for value in set(values)}
    for row, value in enumerate(values):
        number = number_of[value]
        if number is None:
            missing = _trimmed(value) is None or value != value
            problem = MISSING if missing else _not_among(class_names)
            rows.reject(row, f"label {value!r} in column {column!r} {problem}")
        else:
            numbers[row] = number
    return torch.tensor(numbers)


def match_labels(source: str, rows: Rows, column: str, class_names: list[str]) -> torch.Tensor:
    """Return the numbers that a run gave to classes, int64 [N], for other data, by the names of the classes.

    Rows without a label are rejected and hold 0.

    Raises:
        DataError: the data hold a class that the run does not know.
    """
    feature = rows.data.features[column]
    values = [_plain(value) for value in rows.column(column).to_pylist()]
    if type(feature).__name__ == "ClassLabel":  # with numbers of its own
        values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
    named = {name: number for number, name in enumerate(class_names)}
    unknown = [row for row, value in enumerate(values) if value is not None and str(value) not in named]
    if unknown:
        name = values[unknown[0]]
        known = ", ".join(map(repr, class_names[:20])) + (", ..." if len(class_names) > 20 else "")
        raise DataError(
            f"{source}: class {name!r} in column {column!r} is none of the classes that the run was trained on: "
            f"{known}. Rename or remove it; the first of {len(unknown):,} such samples is {rows.where(unknown[0])}"
        )
    for row, value in enumerate(values):
        if value is None:
            rows.reject(row, f"the label in column {column!r} {MISSING}")
    return torch.tensor([0 if value is None else named[str(value)] for value in values], dtype=torch.int64)


def _plain(value: Any) -> Any:
    """Return a label without spaces around it, a whole number as such, None where it is missing."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None if value != value else value
    return _trimmed(value)


def _number(value: Any, named: dict[str, int], num_classes: int, numbered: bool) -> int | None:
    if numbered:
        return value if isinstance(value, int) and 0 <= value < num_classes else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return named.get(str(_trimmed(value)))


def _trimmed(value: Any) -> Any:
    """Return text without spaces around it, None where nothing is left."""
    return (value.strip() or None) if isinstance(value, str) else value


def _not_among(class_names: list[str]) -> str:
    return f"is none of the {len(class_names)} classes of the training split, {class_names[0]!r} to {class_names[-1]!r}"
