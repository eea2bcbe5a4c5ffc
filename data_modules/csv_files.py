"""CSV and TSV files: typed columns, and the line of every row.

pyarrow reads the cells, in parallel; Python's csv module reads the file again only where a line has to be named.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Piece, Rows, locate

BLOCK = 1 << 26  # bytes of a file that are read at a time; a row must fit in
MISSING = ["", "NA", "#N/A", "N/A", "n/a", "null", "NULL", "None", "?"]  # cells of a table without a value


def read_csv_files(split: str, files: list[str], delimiter: str, options: DataOptions) -> Rows:
    """Read the CSV files of one split. Types are found from all cells; `MISSING` cells become null.

    Raises:
        DataError: a file or a line of it cannot be used; says which, and why.
    """
    import datasets
    import pyarrow as pa

    if options.streaming:
        raise DataError(
            f"--streaming: {options.dataset} holds text tables, which are read whole; use .parquet or .jsonl"
        )
    tables: list[Any] = []
    dropped, not_utf8 = [], []
    for file in files:
        table, lines, is_utf8 = _read_table(file, delimiter, options)
        if not is_utf8:
            before = sum(earlier.num_rows for earlier in tables)
            not_utf8 += [before + row for row in _rows_with(table, "\ufffd")]
        tables.append(table)
        dropped += lines
    first = tables[0].column_names
    for file, table in zip(files, tables):
        if table.column_names != first:
            raise DataError(
                f"{file}: has the columns {', '.join(table.column_names)}, but {files[0]} has {', '.join(first)}; "
                "the files of a split need the same columns in the same order"
            )
    try:
        whole = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers in one file, text in another
        as_text = pa.schema([(name, pa.string()) for name in first])
        whole = pa.concat_tables([table.cast(as_text) for table in tables])
    # Found when first asked for: it takes reading the files once more.
    pieces = cache(lambda: [_piece_of_table(file, delimiter, table) for file, table in zip(files, tables)])
    rows = Rows(split, datasets.Dataset(whole), lambda row: str(locate(pieces(), row)), options.on_bad_sample == "skip")
    rows.dropped.extend(dropped)
    for row in not_utf8:
        rows.reject(row, "is not UTF-8; convert the file: iconv -f LATIN1 -t UTF-8")
    return rows


def _read_table(file: str, delimiter: str, options: DataOptions) -> tuple[Any, list[str], bool]:
    """Return a typed table, messages of lines left out for their number of cells, and whether the file is UTF-8."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    if not content.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(f"{file}: is empty")
    if b"\0" in content:
        raise DataError(f"{file}: is no text: it holds zero bytes. Convert it to UTF-8 text")
    is_utf8 = True
    try:
        content.decode()
    except UnicodeDecodeError:  # the rows in question are found by the sign that takes the place of such bytes
        is_utf8 = False
        content = content.decode(errors="replace").encode()
    _, header = next(_records(file, delimiter))
    other = next((sign for sign in ";\t|," if sign in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"{file}: its one column is {header[0]!r}: cells seem to be separated by {other!r}, not {delimiter!r}. "
            "Separate them by commas in a .csv file, by tabs in a .tsv file"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{file}: column {twice[0]!r} is there {header.count(twice[0])} times; rename or remove one")
    bad_shape = []

    def refuse_or_skip(row: Any) -> str:
        bad_shape.append(row)
        return "skip"

    try:
        table = arrow_csv.read_csv(
            io.BytesIO(content),
            read_options=arrow_csv.ReadOptions(block_size=BLOCK),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse_or_skip
            ),
            convert_options=arrow_csv.ConvertOptions(
                null_values=MISSING,
                strings_can_be_null=True,
                # "01004" and "1004" are two categories, and one number.
                column_types={name: pa.string() for name in options.categorical_columns},
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
    messages = []
    if bad_shape:
        for line, cells in _records(file, delimiter):
            if len(cells) != len(header):
                text = f"{file}, line {line}: has {len(cells)} cells, the header has {len(header)}"
                if options.on_bad_sample == "stop":
                    raise DataError(f"{text}. Correct or remove it, or leave it out with --on_bad_sample skip")
                messages.append(text)
        if len(messages) != len(bad_shape):
            raise DataError(f"{file}: its lines cannot be told apart; look for a quotation mark that is not closed")
    return table, messages, is_utf8


def _records(file: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line on which each record begins, from 1 on, and its cells; the header is first."""
    csv.field_size_limit(BLOCK)
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        line = 1
        for cells in reader:
            if cells:  # an empty line is no record
                yield line, cells
            line = reader.line_num + 1


def _piece_of_table(file: str, delimiter: str, table: Any) -> Piece:
    cells_of_row = len(table.column_names)
    numbers = [line for line, cells in _records(file, delimiter) if len(cells) == cells_of_row][1:]
    return (file, "line", numbers) if len(numbers) == len(table) else (file, "row", range(len(table)))


def _rows_with(table: Any, sign: str) -> list[int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found: set[int] = set()
    for column in table.columns:
        if pa.types.is_string(column.type):
            hit = pc.fill_null(pc.match_substring(column, sign), False)
            found |= set(pc.indices_nonzero(hit).to_pylist())
    return sorted(found)
