"""Points: a column that holds a list of numbers for each sample. Legend: N samples, D numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_modules.errors import DataError
from data_modules.rows import Rows
from data_modules.splits import Arrays, InputSpec


@dataclass(frozen=True)
class PointPreprocessing:
    """Column and length of its lists; numbers are taken as they are."""

    column: str
    size: int

    @property
    def input_spec(self) -> InputSpec:
        """What a model must know."""
        return InputSpec("points", (self.size,))

    def encode(self, rows: Rows) -> Arrays:
        """Return float32 points [N, D]; rows with missing or infinite numbers, or of another length, are rejected.

        Raises:
            DataError: there is no such column.
        """
        if self.column not in rows.data.column_names:
            raise DataError(
                f"split {rows.name!r} has no column {self.column!r}, only {', '.join(rows.data.column_names)}"
            )
        import pyarrow.compute as pc

        column = rows.column(self.column)
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
        fitting = lengths == self.size
        values = pc.list_flatten(column.filter(fitting)).to_numpy(zero_copy_only=False)
        points = np.zeros((len(rows), self.size), dtype=np.float32)
        with np.errstate(over="ignore"):
            points[fitting] = values.reshape(-1, self.size)  # None becomes NaN
        finite = np.isfinite(points).all(axis=1)
        points[~finite] = 0
        for row in np.flatnonzero(~(fitting & finite)).tolist():
            found = "holds a number that is missing, not finite or above 3.4e38"
            if not fitting[row]:
                length = lengths[row]
                found = "is missing" if length < 0 else f"has {length} numbers, most samples {self.size}"
            rows.reject(row, f"column {self.column!r} {found}")
        return Arrays({"inputs": torch.from_numpy(points)})

    def describe(self) -> dict[str, Any]:
        """Return plain values."""
        return {"column": self.column, "size": self.size}

    @classmethod
    def from_description(cls, values: dict[str, Any]) -> PointPreprocessing:
        """Make the preprocessing again from what `describe` returned."""
        return cls(values["column"], values["size"])


def fit_points(rows: Rows, chosen: torch.Tensor, column: str) -> PointPreprocessing:
    """Take the most frequent length of the training samples' lists as that of all.

    Raises:
        DataError: no list holds a number.
    """
    import pyarrow.compute as pc

    lengths = Counter(pc.list_value_length(rows.column(column)).take(chosen.numpy()).to_pylist())
    del lengths[0], lengths[None]
    if not lengths:
        raise DataError(f"column {column!r} of split {rows.name!r} holds no numbers; name another with --input_columns")
    return PointPreprocessing(column, lengths.most_common(1)[0][0])
