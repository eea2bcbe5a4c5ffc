"""Opening what `--dataset` names: a hub id, files, globs, folders of images, or a folder written by save_to_disk."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from data_modules.csv_files import read_csv_files
from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Piece, Rows, locate

WANTED = (
    "Embedded: digits, blobs, breast_cancer, wine. Otherwise give a folder of images, a .csv, .tsv, .parquet or .jsonl "
    "file, folder or glob, or a hub id"
)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BUILDERS = {".parquet": "parquet", ".jsonl": "json"}
IMAGE_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Which split a file belongs to, by a word in its name or its folders'; the words are those of `datasets`.
SPLIT_WORD = re.compile(r"(?:^|[-_./ ])(train|training|validation|valid|val|dev|test|testing)(?=[-_./ 0-9]|$)")
SPLIT_OF_WORD = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
}


def open_source(options: DataOptions) -> dict[str, Rows]:
    """Open all splits.

    Raises:
        DataError: there is no such thing, it is empty, or it cannot be read; says which file, row and why.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)  # what goes wrong is said once, by us
    source = options.dataset
    skip = options.on_bad_sample == "skip"
    try:
        path = Path(source).expanduser()
        exists = path.exists()
        saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))  # by save_to_disk
    except (OSError, RuntimeError) as error:  # a name that is too long, a closed folder, no such user
        raise DataError(f"--dataset {source[:100]}: cannot be opened: {getattr(error, 'strerror', error)}") from error
    if not exists and any(sign in source for sign in "*?["):
        return _open_files(source, sorted(glob.glob(str(path), recursive=True)), options)
    if path.is_file():
        return _open_files(source, [str(path)], options)
    if path.is_dir():
        if saved:
            if options.streaming:
                raise DataError(
                    f"--streaming: {source} was written by save_to_disk and is read as it is needed; leave it out"
                )
            return _wrap(source, _guard(source, options, lambda: datasets.load_from_disk(str(path))), {}, skip)
        kinds = _kinds_in(path)
        tables = kinds & {*DELIMITERS, *BUILDERS}
        described = (path / "README.md").exists() or options.dataset_config is not None  # as on the hub
        if tables and not kinds & IMAGE_FILES and (len(tables) > 1 or tables & {*DELIMITERS} or not described):
            return _open_files(source, sorted(_files_of(path, tables)), options)
        if not kinds & {*BUILDERS, *IMAGE_FILES, *DELIMITERS, ".zip", ".tar", ".arrow"}:
            found = f"files of the kinds {', '.join(sorted(kinds))}" if kinds else "no file"
            raise DataError(f"--dataset {source}: the folder holds {found}. {WANTED}")
        if any(sign in str(path) for sign in "*?["):
            raise DataError(
                f"--dataset {source}: `datasets` takes [, * and ? in a folder's path for a pattern; rename it"
            )
        if kinds & IMAGE_FILES and not tables and not described:
            return _build(source, options, "imagefolder", _split_folders(path))
        return _build(source, options, str(path))
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or path.suffix.lower() in {*DELIMITERS, *BUILDERS}:
        raise DataError(f"--dataset {source}: no such file or folder")
    return _build(source, options, source)


def _kinds_in(folder: Path, most: int = 10_000) -> set[str]:
    """Return the suffixes of the files in a folder, looking at no more than `most` of them."""
    return {Path(file).suffix.lower() for file in islice(_files_in(folder), most)}


def _files_of(folder: Path, kinds: set[str]) -> list[str]:
    return [file for file in _files_in(folder) if Path(file).suffix.lower() in kinds]


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the files in a folder and below; hidden ones, such as an editor's copies, are no data."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in files if not name.startswith("."))


def _split_folders(path: Path) -> dict[str, list[str]]:
    """Return a pattern for the files of each split of a folder of images.

    Folders are splits if all have the name of one, in any case, and one is train; else they are classes. `datasets`
    looks for such words in the names of files and classes too, and leaves the others out.
    """
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    splits = [SPLIT_OF_WORD.get(folder.name.lower(), folder.name.lower()) for folder in folders]
    if "train" not in splits or not {*splits} <= {"train", "validation", "test"}:
        return {"train": [f"{path}/**"]}
    patterns: dict[str, list[str]] = {}
    for split, folder in zip(splits, folders):
        patterns.setdefault(split, []).append(f"{folder}/**")
    return patterns


def _open_files(source: str, files: list[str], options: DataOptions) -> dict[str, Rows]:
    """Open files of one kind; each belongs to the split that a word in its path names, else to train."""
    if not files:
        raise DataError(f"--dataset {source}: no file matches")
    kinds = {Path(file).suffix.lower() for file in files}
    if len(kinds) > 1:
        raise DataError(f"--dataset {source}: files of several kinds, {', '.join(sorted(kinds))}; name one with a glob")
    kind = kinds.pop()
    if kind not in DELIMITERS and kind not in BUILDERS:
        raise DataError(f"--dataset {source}: cannot open {kind or 'such'} files. {WANTED}")
    base = os.path.commonpath([str(Path(file).parent) for file in files])
    by_split: dict[str, list[str]] = {}
    for file in files:
        inside = os.path.relpath(file, base).lower()
        words = SPLIT_WORD.findall(inside.removesuffix(kind)) if len(files) > 1 else []
        word = words[-1] if words else "train"
        by_split.setdefault(SPLIT_OF_WORD.get(word, word), []).append(file)
    if kind in BUILDERS:
        for file in files:
            if os.path.isfile(file) and os.path.getsize(file) == 0:
                raise DataError(f"{file}: is empty")
        # What is in a path is no pattern here: those were resolved.
        exact = {split: [glob.escape(file) for file in members] for split, members in by_split.items()}
        return _build(source, options, BUILDERS[kind], exact)
    return {split: read_csv_files(split, members, DELIMITERS[kind], options) for split, members in by_split.items()}


# ---- through `datasets` ----------------------------------------------------------------------------------------------


def _build(source: str, options: DataOptions, what: str, files: dict[str, list[str]] | None = None) -> dict[str, Rows]:
    import datasets

    def load() -> tuple[Any, Any]:
        name = options.dataset_config
        builder = datasets.load_dataset_builder(what, name, data_files=files, revision=options.revision)
        if options.streaming:
            return builder, builder.as_streaming_dataset()
        builder.download_and_prepare()
        return builder, builder.as_dataset()

    builder, splits = _guard(source, options, load)
    members = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    return _wrap(source, splits, members, options.on_bad_sample == "skip")


def _guard(source: str, options: DataOptions, load: Callable[[], Any]) -> Any:
    """Run what opens a data set, and turn whatever it raises into one message."""
    import datasets

    try:
        return load()
    except Exception as error:  # datasets raises many kinds for the same thing: it cannot be opened
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = (str(cause or error).strip().splitlines() or [type(error).__name__])[0].rstrip(".!")
        # What it says of Parquet files without a group of rows, and with a group without rows.
        empty = re.search("Instruction (.+) corresponds to no data|BatchSize must be greater than 0", reason)
        if empty:
            what = f"split {empty[1]}" if empty[1] else "a Parquet file"
            raise DataError(f"{source}: {what} has no rows; fill it or remove it") from error
        if Path(source).expanduser().exists() or any(sign in source for sign in "*?["):
            raise DataError(f"--dataset {source}: cannot be opened: {reason}. {WANTED}") from error
        if options.dataset_config is not None or options.revision is not None:
            raise DataError(f"--dataset {source}: {reason}") from error
        raise DataError(f"--dataset {source}: is no path, and on the hub: {reason}. {WANTED}") from error


def _wrap(source: str, opened: Any, files: dict[str, list[str]], skip: bool) -> dict[str, Rows]:
    splits = dict(opened) if isinstance(opened, dict) else {"train": opened}

    def place(split: str) -> Callable[[int], str]:
        members = files.get(split, [])
        local = all(Path(file).suffix.lower() in BUILDERS and os.path.exists(file) for file in members)
        pieces = cache(lambda: [_piece_of(file) for file in members] if local else [])  # found when first asked for
        return lambda row: locate(pieces(), row) or f"{source}, split {split!r}, row {row}"

    return {str(name): Rows(str(name), split, place(str(name)), skip) for name, split in splits.items()}


def _piece_of(file: str) -> Piece:
    if file.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return file, "row", range(pq.ParquetFile(file).metadata.num_rows)
    with open(file, "rb") as lines:
        return file, "line", [number for number, line in enumerate(lines, start=1) if line.strip()]
