"""One long sequence, sample by sample: noisy sinusoids that are made here, or rows of a .npy or .csv file."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
import xxhash

from data_modules.errors import DataError

FREQUENCIES = (1, 3, 5, 7)  # Hz
SAMPLE_RATE = 1000  # Hz
SECONDS = 10
AMPLITUDES = (0.8, 1.2)  # of each sinusoid at each sample, uniform
PHASE_NOISE = 0.02 * 2 * np.pi  # radians to either side, uniform
NOISE_SEEDS = {"train": 1, "validation": 2, "test": 3}
# What numpy (2.4) raises at a damaged file: it parses the header as Python.
DAMAGED = (ValueError, EOFError, SyntaxError, TokenError)


@dataclass(frozen=True)
class Sequence:
    """Samples in the order of time."""

    inputs: torch.Tensor  # float32 [N, F]
    targets: torch.Tensor  # float32 [N, 1]
    groups: dict[str, torch.Tensor]  # numbers of the samples that a one-hot column selects, int64, by its name

    def __len__(self) -> int:
        return len(self.inputs)

    def fingerprint(self) -> str:
        """Return a checksum of the samples in their order."""
        digest = xxhash.xxh3_128()
        for part in (self.inputs, self.targets):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def make_sinusoids(split: str) -> Sequence:
    """Make rows [S, C1, C2, C3, C4, target]: S mixes four noisy sinusoids, the one-hot C selects one of them.

    S is the mean of the four, each with an amplitude and a phase that are drawn anew at every sample. The target is the
    selected sinusoid without noise. The same S is gone through once for each sinusoid, 10,000 samples each; the splits
    differ by their noise only.

    Args:
        split: "train", "validation" or "test".
    """
    noise = np.random.default_rng(NOISE_SEEDS[split])
    angles = 2 * np.pi * np.outer(FREQUENCIES, np.arange(SAMPLE_RATE * SECONDS) / SAMPLE_RATE)
    amplitude = noise.uniform(*AMPLITUDES, angles.shape)
    phase = noise.uniform(-PHASE_NOISE, PHASE_NOISE, angles.shape)
    mixed = (amplitude * np.sin(angles + phase)).mean(axis=0)
    rows = [
        np.column_stack([mixed, *np.broadcast_to(choice[:, None], (4, len(mixed))), np.sin(angles[number])])
        for number, choice in enumerate(np.eye(len(FREQUENCIES)))
    ]
    return _split_columns(np.concatenate(rows), ["S", *(f"{frequency} Hz" for frequency in FREQUENCIES)])


def load_sequence(path: str | Path) -> Sequence:
    """Read the rows of a file: input columns, and the target as the last one.

    Args:
        path: a .npy file with an array [N, F + 1] of numbers, or a .csv file with F + 1 columns, with or without a line
            of names.

    Raises:
        DataError: names the file and, where a value is at fault, its row, counted from 0, and its column.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"{path}: {what}; give a .npy or a .csv file")
    if path.suffix.lower() == ".npy":
        rows, names = _read_npy(path), None
    elif path.suffix.lower() == ".csv":
        rows, names = _read_csv(path)
    else:
        raise DataError(f"{path}: must be a .npy or a .csv file")
    if rows.shape[0:1] == (0,):
        raise DataError(f"{path}: holds no rows")
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise DataError(
            f"{path}: has shape {rows.shape}; it must be (samples, columns) with two columns or more, of which the "
            "last is the target"
        )
    names = names or [f"column {column}" for column in range(rows.shape[1])]
    with np.errstate(over="ignore"):
        single = rows.astype(np.float32)
    wrong = np.argwhere(~np.isfinite(single))
    if len(wrong):
        row, column = wrong[0]
        more = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        raise DataError(
            f"{path}: row {row}, {names[column]}: {rows[row, column]} is not a finite float32 number{more}; the state "
            "carries every sample on to all later ones, so mend the file or cut it before that row"
        )
    return _split_columns(single, names)


def _read_npy(path: Path) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=False)
    except (*DAMAGED, OSError, MemoryError) as error:
        # What is no array file numpy takes for a pickle, and says how to load it all the same.
        reason = "it holds no numbers, or is not of numpy.save" if "pickle" in str(error) else error
        raise DataError(f"{path}: cannot be read as an array of numbers ({reason})") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu":
        kind = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise DataError(f"{path}: holds {kind}; it must hold real numbers, such as float32")
    return rows


def _read_csv(path: Path) -> tuple[np.ndarray, list[str] | None]:
    names: list[str] | None = None
    rows: list[list[float]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for cells in csv.reader(file):
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) == 1 and not _is_number(cells[0]) and any(mark in cells[0] for mark in ";\t"):
                    raise DataError(f"{path}: columns are to be apart by commas, not by semicolons or tabs")
                if not rows and names is None and not any(_is_number(cell) for cell in cells):
                    names = cells
                    continue
                width = len(rows[0]) if rows else len(names or cells)
                if len(cells) != width:
                    raise DataError(f"{path}: row {len(rows)} has {len(cells)} columns, the rows before have {width}")
                rows.append([_to_number(path, len(rows), column, cell, names) for column, cell in enumerate(cells)])
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; save it as such") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return np.array(rows, dtype=np.float64), names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_000 as a number


def _to_number(path: Path, row: int, column: int, cell: str, names: list[str] | None) -> float:
    if not _is_number(cell):
        name = names[column] if names else f"column {column}"
        raise DataError(f"{path}: row {row}, {name}: {cell!r} is no number")
    return float(cell)


def _split_columns(rows: np.ndarray, names: list[str]) -> Sequence:
    """Cut rows into inputs and target, and find the columns behind the first that select, one-hot, what is wanted."""
    inputs = torch.tensor(rows[:, :-1], dtype=torch.float32)
    targets = torch.tensor(rows[:, -1:], dtype=torch.float32)
    choice = inputs[:, 1:]
    groups: dict[str, torch.Tensor] = {}
    binary = bool(((choice == 0) | (choice == 1)).all())
    if choice.shape[1] > 1 and binary and bool((choice.sum(dim=1) == 1).all()):
        for name, chosen in zip(names[1:], choice.T):
            if chosen.any():
                groups[name if name not in groups else f"{name} {len(groups)}"] = chosen.nonzero().squeeze(1)
    return Sequence(inputs, targets, groups)
