"""Samples without labels, from what a person names: images, folders, tables, lines of text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.source import BUILDERS, DELIMITERS, IMAGE_FILES
from data_modules.splits import Split
from train.evaluation.samples import Part, build_data, columns_of, encode_rows, open_rows
from train.evaluation.trained_run import TrainedRun

TABLES = {*DELIMITERS, *BUILDERS}


def read_samples(run: TrainedRun, sources: Sequence[str]) -> tuple[list[str], list[Part]]:
    """Return a name for each sample, and the samples in the same order.

    Args:
        run: whose preprocessing is applied.
        sources: files and folders; - is stdin.

    Raises:
        DataError: something is not there, of another kind than the run takes, or cannot be used.
    """
    images: list[str] = []
    tables: list[Rows] = []
    for source in sources:
        for file in _find_files(run, source):
            if file.suffix.lower() in TABLES:
                options = DataOptions(dataset=str(file), on_bad_sample="skip")
                tables += [dataclasses.replace(rows, name=str(file)) for rows in open_rows(run, options).values()]
            elif run.inputs.task == "image":
                images.append(str(file))
            else:
                tables.append(_read_lines(run, file))
    names = list(images)  # messages about images name their files themselves
    names += [rows.where(row) for rows in tables for row in range(len(rows))]
    pieces = [_make_rows(run, "images", images, lambda row: f"image {row + 1}")] if images else []
    parts = []
    for rows in [*pieces, *tables]:
        samples = encode_rows(run, rows, later=True)
        split = Split(samples, torch.zeros(len(rows), dtype=torch.int64))
        parts.append(Part(rows.name, "all", split, build_data(run, split)))
    return names, parts


def _find_files(run: TrainedRun, source: str) -> list[Path]:
    task = run.inputs.task
    kinds = {"image": IMAGE_FILES, "text": TABLES | {".txt"}}.get(task, TABLES)
    path = Path(source)
    if source == "-" and task == "text":
        return [path]
    if path.is_dir():
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in kinds and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not inside:
            raise DataError(f"{source}: the folder holds no file of the kinds {', '.join(sorted(kinds))}")
        return inside
    if not path.is_file():
        raise DataError(f"{source}: no such file or folder")
    if path.suffix.lower() not in kinds and task != "image":  # an image is known by its content
        raise DataError(f"{source}: the run takes {task} samples, in files of the kinds {', '.join(sorted(kinds))}")
    return [path]


def _read_lines(run: TrainedRun, file: Path) -> Rows:
    """Return the lines of a text file that are not blank."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8; convert it: iconv -f LATIN1 -t UTF-8"
        raise DataError(f"{file}: cannot be read: {reason}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    return _make_rows(run, str(file), [line for _, line in lines], lambda row: f"{file}, line {lines[row][0]}")


def _make_rows(run: TrainedRun, name: str, cells: Sequence[Any], where: Callable[[int], str]) -> Rows:
    """Return rows of the one column that the run takes."""
    import datasets

    feature = datasets.Image() if run.inputs.task == "image" else datasets.Value("string")
    (column,) = columns_of(run)
    data = datasets.Dataset.from_dict({column: list(cells)}, features=datasets.Features({column: feature}))
    return Rows(name, data, where, skip_bad=True)
