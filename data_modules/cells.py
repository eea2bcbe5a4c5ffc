"""The cells of a table's column as pyarrow has them: what they are, as numbers, as text, and which cannot be used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from data_modules.errors import DataError
from data_modules.rows import Rows

if TYPE_CHECKING:
    import pyarrow as pa

# What text must look like to be a number: no "nan", no "inf", no thousands separators. RE2: \d is 0 to 9, $ the end.
NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"


def is_class_label(rows: Rows, name: str) -> bool:
    """Return whether a column holds numbers that stand for names."""
    import datasets

    return isinstance(rows.data.features[name], datasets.ClassLabel)


def is_text(cells: pa.ChunkedArray) -> bool:
    """Return whether cells hold text."""
    import pyarrow as pa

    types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(cells.type) for check in types)


def read_column(rows: Rows, name: str) -> pa.ChunkedArray:
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
    if is_class_label(rows, name):
        names = pa.array(data.features[name].names, pa.large_string())
        cells = pc.take(names, pc.if_else(pc.less(cells, 0), pa.scalar(None, cells.type), cells))  # -1: no label
    if is_text(cells):
        text = pc.utf8_trim_whitespace(cells.cast(pa.large_string()))
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    if not any(check(cells.type) for check in types):
        raise DataError(
            f"{rows.name}: column {name!r} holds {cells.type}, not numbers or text. Convert it (a date to a number of "
            "days, a list to columns), or name only other columns with --input_columns"
        )
    return cells


def parse_numbers(cells: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells as float64 [N], nan where there is no number, and where they are missing, bool [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = cells
    if is_text(cells):
        numbers = pc.if_else(pc.match_substring_regex(cells, NUMBER), cells, pa.scalar(None, cells.type))
    # Not safe: integers above 2**53 are rounded.
    values = numbers.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy()
    return values, cells.is_null().to_numpy()


def write_texts(cells: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return cells as text, whole numbers without a point: 3.0 is "3", as it is in a file that has no missing value."""
    import pyarrow as pa

    if not (pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type)):
        return cells.cast(pa.large_string())
    coded = cells.cast(pa.float64()).combine_chunks().dictionary_encode()
    values = coded.dictionary.to_pylist()
    texts = [str(int(value)) if value.is_integer() else repr(value) for value in values]
    return pa.array(texts, pa.large_string()).take(coded.indices)


def reject_cells(rows: Rows, name: str, cells: pa.ChunkedArray, wrong: np.ndarray, why: str = "") -> None:
    """Reject the rows where `wrong`, bool [N]."""
    for row in np.flatnonzero(wrong).tolist():
        value = repr(cells[row].as_py())
        rows.reject(row, f"column {name!r} is {value if len(value) <= 60 else value[:57] + '...'}{why}")


def reject_unreadable(
    rows: Rows, name: str, cells: pa.ChunkedArray, values: np.ndarray, missing: np.ndarray, hint: str = ""
) -> np.ndarray:
    """Reject the rows whose cell is there and no finite number; return where, bool [N]."""
    wrong = ~np.isfinite(values) & ~missing
    reject_cells(rows, name, cells, wrong, f", not a number{hint}" if is_text(cells) else "")
    return wrong


def reject_infinite(rows: Rows, name: str, cells: pa.ChunkedArray) -> np.ndarray:
    """Reject the rows of a category whose cell is a number that is not finite; return where, bool [N]."""
    if is_text(cells):
        return np.zeros(len(rows), dtype=bool)
    return reject_unreadable(rows, name, cells, *parse_numbers(cells))
