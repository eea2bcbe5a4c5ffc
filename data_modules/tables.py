"""Tables: columns of numbers are standardised, columns of text become categories. Legend: N rows, D numbers of a
row, K categories of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_modules.errors import DataError
from data_modules.rows import Rows
from data_modules.splits import Arrays, InputSpec

if TYPE_CHECKING:
    import pyarrow as pa

# What text must look like to be a number: no "nan", no "inf", no thousands separators. RE2: \d is 0 to 9, $ the end.
NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"


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
            cells = _read_column(rows, column.name)
            values, missing = _parse_numbers(cells)
            bad |= _reject_unreadable(rows, column.name, cells, values, missing)
            with np.errstate(over="ignore"):
                standard = ((values - column.mean) / column.std).astype(np.float32)
            far = np.isfinite(values) & ~np.isfinite(standard)
            _reject_cells(rows, column.name, cells, far, ", too far from the training values")
            bad |= far
            standard[missing] = 0.0
            numbers[:, place] = torch.from_numpy(standard)
            if column.indicator:
                numbers[:, self.indicators[column.name]] = torch.from_numpy(missing).float()
        for place, kind in enumerate(self.categories):
            cells = _read_column(rows, kind.name)
            bad |= _reject_infinite(rows, kind.name, cells)
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
        cells = _read_column(rows, name)
        kinds[name] = name in categorical or _is_class_label(rows, name)
        if not kinds[name] and _is_text(cells):
            kinds[name], said = _judge_text(name, cells, used)
            notes += said
        if kinds[name]:
            _reject_infinite(rows, name, cells)
        else:
            hint = " as most of the column (--categorical_columns takes them all as categories)"
            _reject_unreadable(rows, name, cells, *_parse_numbers(cells), hint)
    used = _training_mask(rows, chosen)
    fitted: list[NumberColumn | CategoryColumn] = []
    for name, is_category in kinds.items():
        column, said = (_fit_categories if is_category else _fit_numbers)(rows, name, used)
        fitted.append(column)
        notes += said
    return TablePreprocessing(tuple(fitted)), notes


def table_statistics(preprocessing: TablePreprocessing, samples: Arrays, chosen: torch.Tensor) -> list[str]:
    """Return an aligned line for each column, for a look at the data before a run.

    Args:
        preprocessing: What was fitted on the rows of training.
        samples: The encoded split.
        chosen: The rows of training that were not rejected, int64.
    """
    numbers, categories = (samples.tensors[name][chosen] for name in ("numbers", "categories"))
    number_place, category_place = 0, 0
    table: list[tuple[str, str, str, str]] = []
    for column in preprocessing.columns:
        if isinstance(column, NumberColumn):
            values = numbers[:, number_place].double() * column.std + column.mean
            missing = float(numbers[:, preprocessing.indicators[column.name]].mean()) if column.indicator else 0.0
            # Samples are float32: what is below a hundred-thousandth of the deviation is rounding.
            digits = 5 - math.floor(math.log10(column.std))
            low, high = (round(float(value), digits) + 0.0 for value in (values.min(), values.max()))
            std = column.std if low < high else 0.0
            said = f"min {low:.4g}, mean {column.mean:.4g}, max {high:.4g}, std {std:.4g}"
            table.append((column.name, "number", f"{missing:.1%}", said))
            number_place += 1
        else:
            counts = torch.bincount(categories[:, category_place], minlength=column.size) / len(chosen)
            places = counts[1 : 1 + len(column.values)]
            best = int(places.argmax())
            said = f"{len(column.values):,} categories, most often {column.values[best]!r} ({float(places[best]):.1%})"
            missing = float(counts[-1]) if column.missing else 0.0
            table.append((column.name, "category", f"{missing:.1%}", said))
            category_place += 1
    widths = [max(len(line[part]) for line in table) for part in range(3)]
    return [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  missing {missing:>{widths[2]}}  {said}"
        for name, kind, missing, said in table
    ]


def _training_mask(rows: Rows, chosen: torch.Tensor) -> np.ndarray:
    """Return where the chosen rows are that were not rejected, bool [N]."""
    mask = np.zeros(len(rows), dtype=bool)
    mask[chosen.numpy()] = True
    mask[list(rows.bad)] = False
    return mask


def _is_class_label(rows: Rows, name: str) -> bool:
    """Return whether a column holds numbers that stand for names."""
    import datasets

    return isinstance(rows.data.features[name], datasets.ClassLabel)


def _is_text(cells: pa.ChunkedArray) -> bool:
    """Return whether cells hold text."""
    import pyarrow as pa

    types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(cells.type) for check in types)


def _read_column(rows: Rows, name: str) -> pa.ChunkedArray:
    """Return the cells of a column: text without spaces around it, null where it is empty, or numbers or booleans.

    Raises:
        DataError: the column is not there or of a type that cannot be used.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    data = rows.data
    if name not in data.column_names:
        raise DataError(
            f"{rows.name}: no column {name!r}; there are {', '.join(data.column_names)}. Add or rename it, or choose "
            "the columns of a run with --input_columns"
        )
    cells = data.select_columns([name]).with_format("arrow")[:].column(0)
    if _is_class_label(rows, name):
        names = pa.array(data.features[name].names, pa.large_string())
        cells = pc.take(names, pc.if_else(pc.less(cells, 0), pa.scalar(None, cells.type), cells))  # -1: no label
    if _is_text(cells):
        text = pc.utf8_trim_whitespace(cells.cast(pa.large_string()))
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    if not any(check(cells.type) for check in types):
        raise DataError(
            f"{rows.name}: column {name!r} holds {cells.type}, not numbers or text. Convert it (a date to a number of "
            "days, a list to columns), or name only other columns with --input_columns"
        )
    return cells


def _parse_numbers(cells: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells as float64 [N], nan where there is no number, and where they are missing, bool [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = cells
    if _is_text(cells):
        numbers = pc.if_else(pc.match_substring_regex(cells, NUMBER), cells, pa.scalar(None, cells.type))
    # Not safe: integers above 2**53 are rounded.
    values = numbers.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy()
    return values, cells.is_null().to_numpy()


def _write_texts(cells: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return cells as text, whole numbers without a point: 3.0 is "3", as it is in a file that has no missing value."""
    import pyarrow as pa

    if not (pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type)):
        return cells.cast(pa.large_string())
    coded = cells.cast(pa.float64()).combine_chunks().dictionary_encode()
    values = coded.dictionary.to_pylist()
    texts = [str(int(value)) if value.is_integer() else repr(value) for value in values]
    return pa.array(texts, pa.large_string()).take(coded.indices)


def _number_categories(cells: pa.ChunkedArray, kind: CategoryColumn) -> np.ndarray:
    """Return the category numbers of cells, int64 [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = _write_texts(cells)
    places = pc.index_in(texts, value_set=pa.array(kind.values, pa.large_string()))
    numbers = places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    if kind.missing:
        numbers[cells.is_null().to_numpy()] = kind.size - 1
    return numbers


def _reject_cells(rows: Rows, name: str, cells: pa.ChunkedArray, wrong: np.ndarray, why: str = "") -> None:
    """Reject the rows where `wrong`, bool [N]."""
    for row in np.flatnonzero(wrong).tolist():
        value = repr(cells[row].as_py())
        rows.reject(row, f"column {name!r} is {value if len(value) <= 60 else value[:57] + '...'}{why}")


def _reject_unreadable(
    rows: Rows, name: str, cells: pa.ChunkedArray, values: np.ndarray, missing: np.ndarray, hint: str = ""
) -> np.ndarray:
    """Reject the rows whose cell is there and no finite number; return where, bool [N]."""
    wrong = ~np.isfinite(values) & ~missing
    _reject_cells(rows, name, cells, wrong, f", not a number{hint}" if _is_text(cells) else "")
    return wrong


def _reject_infinite(rows: Rows, name: str, cells: pa.ChunkedArray) -> np.ndarray:
    """Reject the rows of a category whose cell is a number that is not finite; return where, bool [N]."""
    if _is_text(cells):
        return np.zeros(len(rows), dtype=bool)
    return _reject_unreadable(rows, name, cells, *_parse_numbers(cells))


def _judge_text(name: str, cells: pa.ChunkedArray, used: np.ndarray) -> tuple[bool, list[str]]:
    """Return whether text is of categories rather than of numbers, and notes."""
    values, missing = _parse_numbers(cells)
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
    values, missing = _parse_numbers(_read_column(rows, name))
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

    texts = _write_texts(_read_column(rows, name)).filter(pa.array(used))
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
