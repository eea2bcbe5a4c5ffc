"""One split as it was opened: rows, where each comes from, and which of them cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from data_modules.errors import DataError

if TYPE_CHECKING:
    import datasets


# A file and, for each of its rows, the number by which messages name it: ("pets.csv", "line", [2, 3, 5]).
Piece = tuple[str, str, Sequence[int]]


@dataclass(frozen=True)
class Rows:
    """A split. Encoding its columns reports rows that cannot be used by `reject`."""

    name: str  # of the split
    data: datasets.Dataset
    where: Callable[[int], str]  # a row's place for messages, such as "pets.csv, line 7"
    skip_bad: bool = False
    bad: dict[int, str] = field(default_factory=dict)  # what is wrong, by row
    dropped: list[str] = field(default_factory=list)  # what was left out before it became a row

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> Any:
        """Return a column as one pyarrow array; thousands of times faster than row by row."""
        return self.data.select_columns([name]).with_format("arrow")[:].column(name).combine_chunks()

    def reject(self, row: int, problem: str) -> None:
        """Note that a row cannot be used.

        Raises:
            DataError: bad samples are not to be skipped.
        """
        if row in self.bad:
            return
        message = f"{self.where(row)}: {problem}"
        if not self.skip_bad:
            raise DataError(f"{message}. Correct or remove it, or leave such samples out with --on_bad_sample skip")
        self.bad[row] = message

    def good(self) -> torch.Tensor:
        """Return the rows that were not rejected, int64, in their order."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[list(self.bad)] = False
        return kept.nonzero()[:, 0]


def locate(pieces: list[Piece], row: int) -> str | None:
    """Return the place of a row of several files in a row; None if they have not as many."""
    for file, word, numbers in pieces:
        if row < len(numbers):
            return f"{file}, {word} {numbers[row]}"
        row -= len(numbers)
    return None
