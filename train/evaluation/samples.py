"""The samples that a run is asked about: a split of its own data, other data with labels, or rows without."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from data_modules.columns import find_columns
from data_modules.decoding import EncodedColumn
from data_modules.errors import DataError
from data_modules.images import ImagePreprocessing
from data_modules.labels import match_labels
from data_modules.load import load_data
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.source import open_source
from data_modules.splits import DataModule, Samples, Split
from train.evaluation.trained_run import TrainedRun, restore_reader


@dataclass(frozen=True)
class Part:
    """A split, and the data module that prepares its batches."""

    dataset: str
    name: str
    split: Split
    data: DataModule

    @property
    def numbers(self) -> torch.Tensor:
        """The row of each sample in the split of the source, int64 [N]."""
        return torch.arange(len(self.split)) if self.split.rows is None else self.split.rows


def load_part(run: TrainedRun, dataset: str | None, split: str | None, label_column: str | None) -> Part:
    """Load a split of the run's own data, or of other data with labels.

    Args:
        run: whose preprocessing is applied.
        dataset: None: the run's own.
        split: None: test; without one the validation split, or the only one of other data.
        label_column: of other data. None: as in training.

    Raises:
        DataError: it cannot be used, the run's data have changed since, or there is no such split.
    """
    if dataset is None or dataset == run.config["dataset"]:
        return _load_own(run, split)
    options = DataOptions(dataset=dataset, on_bad_sample="skip")
    opened = open_rows(run, options)
    name = choose_split(dataset, opened, split)
    rows = dataclasses.replace(opened[name], name=dataset)
    if run.kind == "classify":
        fitted = columns_of(run)
        if rows.data.column_names == ["image"] and Path(dataset).is_dir():
            rows = _label_by_folder(rows)
        wanted = dataclasses.replace(
            options,
            task=run.inputs.task,
            input_columns=tuple(fitted),
            label_column=label_column or run.config["label_column"],
        )
        label = find_columns(dataset, rows, wanted).label
        assert label is not None
        labels = match_labels(dataset, rows, label, run.class_names)
    else:
        labels = torch.zeros(len(rows), dtype=torch.int64)
    part = Split(encode_rows(run, rows), labels)
    return Part(dataset, name if len(opened) > 1 else "all", part, build_data(run, part))


def _label_by_folder(rows: Rows) -> Rows:
    """Return images with their folders' names as labels, which `datasets` (5.0) leaves out where all have the same."""
    column = EncodedColumn(rows, "image")
    names = [Path(column.path(row) or "").parent.name for row in range(len(rows))]
    return dataclasses.replace(rows, data=rows.data.add_column("label", names))


def _load_own(run: TrainedRun, wanted: str | None) -> Part:
    options = run.data_options
    data = load_data(options, labelled=run.kind == "classify")
    same = data.fingerprint == run.checkpoint.record["data"]["fingerprint"]
    # Through JSON, as the run's was: tuples become lists.
    if not same or json.loads(json.dumps(data.describe_preprocessing())) != run.preprocessing:
        raise DataError(
            f"{options.dataset}: has changed since {run.path} was trained on it; give the file or folder to evaluate "
            "with --dataset, under another path than that"
        )
    splits = data.splits()
    if data.stream is not None:
        del splits["train"]  # a block of it
    name = choose_split(options.dataset, splits, wanted)
    return Part(options.dataset, name, splits[name], data)


def choose_split(source: str, splits: Mapping[str, object], wanted: str | None) -> str:
    """Return the name of the split that is meant.

    Raises:
        DataError: there is none of that name, or several and none was named.
    """
    if wanted is None:
        wanted = next((name for name in ("test", "validation") if name in splits), None)
        wanted = next(iter(splits)) if wanted is None and len(splits) == 1 else wanted
    if wanted is None or wanted not in splits:
        found = f"no split {wanted!r}" if wanted else "several splits"
        raise DataError(f"{source}: has {found}, choose with --split from: {', '.join(splits)}")
    return wanted


def columns_of(run: TrainedRun) -> list[str]:
    """Return the columns that the run takes from a file.

    Raises:
        DataError: it takes none.
    """
    fitted = restore_reader(run)[0].describe()
    return [fitted["column"]] if "column" in fitted else [column["name"] for column in fitted["columns"]]


def open_rows(run: TrainedRun, options: DataOptions) -> dict[str, Rows]:
    """Open the splits of files whose columns the run takes; text stays text where all of it looks like numbers."""
    as_text = columns_of(run) if run.inputs.task == "text" else []
    if run.inputs.task == "table":
        as_text = [column["name"] for column in run.preprocessing["fitted"]["columns"] if "values" in column]
    return open_source(dataclasses.replace(options, categorical_columns=tuple(as_text)))


def encode_rows(run: TrainedRun, rows: Rows, *, later: bool = False) -> Samples:
    """Return rows as samples of the run; `rows.name` is what messages call them.

    Args:
        run: whose preprocessing is applied.
        rows: opened so that bad ones are noted.
        later: decode images when they are gathered, and keep none.

    Raises:
        DataError: a column is missing, or a row cannot be used.
    """
    if not len(rows) and not rows.dropped:
        raise DataError(f"{rows.name}: has no rows")
    names = rows.data.column_names
    missing = [name for name in columns_of(run) if name not in names]
    if missing:
        raise DataError(
            f"{rows.name}: has no column {missing[0]!r}, which the run was trained on; its columns are "
            f"{', '.join(names)}"
        )
    reader = restore_reader(run)[0]
    samples = reader.encode_later(rows) if later and isinstance(reader, ImagePreprocessing) else reader.encode(rows)
    problems = [*rows.dropped, *rows.bad.values()]
    if problems:
        raise DataError(f"{problems[0]}. Correct or remove it (it is the first of {len(problems):,} such sample(s))")
    return samples


def build_data(run: TrainedRun, split: Split) -> DataModule:
    """Return what prepares batches of a split as those of training; the one split stands for all."""
    normalization = restore_reader(run)[1]
    return DataModule(
        name=Path(run.path).name,
        fingerprint="",
        inputs=run.inputs,
        train=split,
        validation=split,
        test=split,
        class_names=run.class_names,
        normalization=normalization,
    )
