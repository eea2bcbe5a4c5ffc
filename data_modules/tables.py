"""Tables: columns of numbers are standardised, columns of text become categories. Legend: N rows, D numbers of a
row, K categories of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_modules.cells import (
    is_class_label,
    is_text,
    parse_numbers,
    read_column,
    reject_cells,
    reject_infinite,
    reject_unreadable,
    write_texts,
)
from data_modules.errors import DataError
from data_modules.rows import Rows
from data_modules.splits import Arrays, InputSpec

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class NumberColumn:
    """A column that is standardised."""

    name: str
    mean: float
    std: float  # 1 where all training values are equal
    indicator: bool  # whether an input of its own says where a value is missing


@dataclass(frozen=True)
class CategoryColumn:
    """A column of categories: 0 is unknown, then `values` by their places, then missing."""

    name: str
    values: tuple[str, ...]  # those of the training rows, sorted
    missing: bool  # whether missing is a category of its own; if not, it is unknown

    @property
    def size(self) -> int:
        """Category numbers are below it."""
        return 1 + len(self.values) + self.missing


@dataclass(frozen=True)
class TablePreprocessing:
    """What turns the named columns of rows into numbers and categories."""

    columns: tuple[NumberColumn | CategoryColumn, ...]

    @property
    def numbers(self) -> list[NumberColumn]:
        return [column for column in self.columns if isinstance(column, NumberColumn)]

    @property
    def categories(self) -> list[CategoryColumn]:
        return [column for column in self.columns if isinstance(column, CategoryColumn)]

    @property
    def indicators(self) -> dict[str, int]:
        """The place among a row's numbers that says whether the named column is missing; they follow the columns."""
        names = [column.name for column in self.numbers if column.indicator]
        return {name: len(self.numbers) + place for place, name in enumerate(names)}

    @property
    def input_spec(self) -> InputSpec:
        """What a model must know of the samples."""
        width = len(self.numbers) + len(self.indicators)
        return InputSpec("table", (width,), category_sizes=tuple(column.size for column in self.categories))

    def encode(self, rows: Rows) -> Arrays:
        """Return "numbers", float32 [N, D], and "categories", int64 [N, K].

        Numbers are the standardised columns in their order, with 0 (the mean) where a value is missing, and then a
        1 or 0 for each column that was missing in training. Rows with a cell that cannot be used are rejected and
        hold zeros.

        Raises:
            DataError: a column is not there or of a type that cannot be used, or bad samples are not to be skipped.
        """
        numbers = torch.zeros(len(rows), *self.input_spec.shape)
        categories = torch.zeros(len(rows), len(self.categories), dtype=torch.int64)
        bad = np.zeros(len(rows), dtype=bool)
        for place, column in enumerate(self.numbers):
            cells = read_column(rows, column.name)
            values, missing = parse_numbers(cells)
            bad |= reject_unreadable(rows, column.name, cells, values, missing)
            with np.errstate(over="ignore"):
                standard = ((values - column.mean) / column.std).astype(np.float32)
            far = np.isfinite(values) & ~np.isfinite(standard)
            reject_cells(rows, column.name, cells, far, ", too far from the training values")
            bad |= far
            standard[missing] = 0.0
            numbers[:, place] = torch.from_numpy(standard)
            if column.indicator:
                numbers[:, self.indicators[column.name]] = torch.from_numpy(missing).float()
        for place, kind in enumerate(self.categories):
            cells = read_column(rows, kind.name)
            bad |= reject_infinite(rows, kind.name, cells)
            categories[:, place] = torch.from_numpy(_number_categories(cells, kind))
        numbers[torch.from_numpy(bad)] = 0.0
        categories[torch.from_numpy(bad)] = 0
        return Arrays({"numbers": numbers, "categories": categories})

    def describe(self) -> dict[str, Any]:
        """Return plain values from which `from_description` makes the same preprocessing."""
        described = [dict(vars(column)) for column in self.columns]
        return {"columns": [{**c, "values": list(c["values"])} if "values" in c else c for c in described]}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> TablePreprocessing:
        """Make the preprocessing again that was described, also after a trip through JSON."""
        columns: list[NumberColumn | CategoryColumn] = []
        for column in description["columns"]:
            if "values" in column:
                columns.append(CategoryColumn(**{**column, "values": tuple(column["values"])}))
            else:
                columns.append(NumberColumn(**column))
        return cls(tuple(columns))


def fit_table(
    rows: Rows, chosen: torch.Tensor, columns: Sequence[str], categorical: Sequence[str]
) -> tuple[TablePreprocessing, list[str]]:
    """Find out what each column is, and measure it on the rows of training.

    Numbers and booleans are numbers; so is text of which 95 % or more are numbers. Other text, and the columns of
    `categorical`, are categories. Rows of the whole split with a cell that cannot be used are rejected; nothing is
    measured on a rejected row.

    Args:
        rows: A whole split.
        chosen: The rows that training uses, int64.
        columns: Those that hold the samples.
        categorical: Those of `columns` that hold categories although they look like numbers.

    Returns:
        The preprocessing, and what was decided on the user's behalf, a line each.

    Raises:
        DataError: a column is not there, has no value in training or is of a type that cannot be used, or bad
            samples are not to be skipped.
    """
    if not columns:
        raise DataError(f"{rows.name}: a table needs an input column. Name them with --input_columns")
    stray = [name for name in categorical if name not in columns]
    if stray:
        raise DataError(
            f"{rows.name}: categorical column {stray[0]!r} is none of the input columns {', '.join(columns)}. Correct "
            "--categorical_columns or --input_columns"
        )
    notes: list[str] = []
    kinds: dict[str, bool] = {}
    used = _training_mask(rows, chosen)
    # All columns are judged before any is measured: a row with a bad cell counts in none of them.
    for name in columns:
        cells = read_column(rows, name)
        kinds[name] = name in categorical or is_class_label(rows, name)
        if not kinds[name] and is_text(cells):
            kinds[name], said = _judge_text(name, cells, used)
            notes += said
        if kinds[name]:
            reject_infinite(rows, name, cells)
        else:
            hint = " as most of the column (--categorical_columns takes them all as categories)"
            reject_unreadable(rows, name, cells, *parse_numbers(cells), hint)
    used = _training_mask(rows, chosen)
    fitted: list[NumberColumn | CategoryColumn] = []
    for name, is_category in kinds.items():
        column, said = (_fit_categories if is_category else _fit_numbers)(rows, name, used)
        fitted.append(column)
        notes += said
    return TablePreprocessing(tuple(fitted)), notes


def _training_mask(rows: Rows, chosen: torch.Tensor) -> np.ndarray:
    """Return where the chosen rows are that were not rejected, bool [N]."""
    mask = np.zeros(len(rows), dtype=bool)
    mask[chosen.numpy()] = True
    mask[list(rows.bad)] = False
    return mask


def _number_categories(cells: pa.ChunkedArray, kind: CategoryColumn) -> np.ndarray:
    """Return the category numbers of cells, int64 [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = write_texts(cells)
    places = pc.index_in(texts, value_set=pa.array(kind.values, pa.large_string()))
    numbers = places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    if kind.missing:
        numbers[cells.is_null().to_numpy()] = kind.size - 1
    return numbers


def _judge_text(name: str, cells: pa.ChunkedArray, used: np.ndarray) -> tuple[bool, list[str]]:
    """Return whether text is of categories rather than of numbers, and notes."""
    values, missing = parse_numbers(cells)
    present = used & ~missing
    found, total = int(np.isfinite(values[present]).sum()), int(present.sum())
    if 20 * found >= 19 * total > 0:
        return False, [f"column {name!r}: text that is taken as numbers; --categorical_columns takes it as categories"]
    if 2 * found >= total > 0:
        return True, [
            f"column {name!r}: {found:,} of {total:,} training values are numbers, the others are not, so that each "
            "value is a category"
        ]
    return True, []


def _fit_numbers(rows: Rows, name: str, used: np.ndarray) -> tuple[NumberColumn, list[str]]:
    """Measure a column of numbers where `used`, bool [N], and return it with notes."""
    values, missing = parse_numbers(read_column(rows, name))
    present = values[used & ~missing]
    num_missing, num_used = int(missing[used].sum()), int(used.sum())
    _refuse_empty(rows, name, len(present))
    notes = []
    mean, std = _measure(present)
    if num_missing:
        notes.append(
            f"column {name!r}: {num_missing:,} of {num_used:,} training values are missing; they become the mean, "
            f"{mean:.4g}, and an input of its own says where"
        )
    if present.min() == present.max():
        notes.append(_constant_note(name, f"{present[0]:.4g}"))
    elif (present == np.round(present)).all():
        notes += _identifier_notes(name, len(np.unique(present)), len(present))
    return NumberColumn(name, mean, std, num_missing > 0), notes


def _fit_categories(rows: Rows, name: str, used: np.ndarray) -> tuple[CategoryColumn, list[str]]:
    """Collect the categories of a column where `used`, bool [N], and return it with notes."""
    import pyarrow as pa

    texts = write_texts(read_column(rows, name)).filter(pa.array(used))
    num_missing, num_used = texts.null_count, int(used.sum())
    _refuse_empty(rows, name, num_used - num_missing)
    values = sorted(texts.drop_null().unique().to_pylist())
    notes = []
    if num_missing:
        notes.append(
            f"column {name!r}: {num_missing:,} of {num_used:,} training values are missing; they are a category of "
            "their own"
        )
    if len(values) == 1:
        notes.append(_constant_note(name, repr(values[0])))
    notes += _identifier_notes(name, len(values), num_used - num_missing)
    return CategoryColumn(name, tuple(values), num_missing > 0), notes


def _measure(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of float64 numbers; 1 for the deviation of equal ones.

    Sums are exact before they are rounded once, so that every machine and order of the rows gives the same bits; a
    million values take 0.2 s. Scaled by a power of two, no square is too large for a float.
    """
    if values.min() == values.max():
        return float(values[0]), 1.0
    exponent = math.frexp(float(np.abs(values).max()))[1]
    scaled = np.ldexp(values, -exponent)
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((scaled - mean) ** 2) / len(scaled))
    return math.ldexp(mean, exponent), math.ldexp(std, exponent) or 1.0


def _refuse_empty(rows: Rows, name: str, num_values: int) -> None:
    """Refuse a column without a value."""
    if num_values == 0:
        raise DataError(
            f"{rows.name}: column {name!r} has no value in the rows of training. Fill it in, or name only other "
            "columns with --input_columns"
        )


def _constant_note(name: str, value: str) -> str:
    """Return what is said of a column with a single value."""
    return f"column {name!r}: the training values are all {value}, which teaches nothing"


def _identifier_notes(name: str, num_distinct: int, num_values: int) -> list[str]:
    """Return what is said of a column that looks like an identifier; of few rows nothing can be said."""
    if num_values < 20 or 20 * num_distinct < 19 * num_values:
        return []
    return [
        f"column {name!r}: a different value in nearly every training row ({num_distinct:,} in {num_values:,}), as an "
        "identifier has; leave it out by naming the other columns with --input_columns"
    ]
