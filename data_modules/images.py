"""Images: what a column of compressed images becomes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data_modules.cache import DecodedImages, load_images
from data_modules.columns import holds_images
from data_modules.decoding import BadImageError, Decoder, EncodedColumn, EncodedImages, color_mode, upright_size
from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.splits import InputSpec


@dataclass(frozen=True)
class ImagePreprocessing:
    """Column and decoder, found in the training split."""

    column: str
    decoder: Decoder
    said: list[str] = field(default_factory=list)  # what decoding took, a line for each split

    @property
    def input_spec(self) -> InputSpec:
        """What a model must know."""
        return InputSpec("image", self.decoder.shape)

    def encode(self, rows: Rows) -> DecodedImages | EncodedImages:
        """Return uint8 images; rows whose image cannot be used are rejected and hold zeros.

        Raises:
            DataError: there is no such column, or images differ in size and none was asked for.
        """
        if self.column not in rows.data.column_names:
            raise DataError(
                f"split {rows.name!r} has no column {self.column!r}, only {', '.join(rows.data.column_names)}"
            )
        images, note = load_images(EncodedColumn(rows, self.column), self.decoder)
        if note:
            self.said.append(note)
        return images

    def encode_later(self, rows: Rows) -> EncodedImages:
        """Return images of a stream's block, that are decoded when it is their turn."""
        nothing_measured = torch.zeros(0, self.decoder.shape[0], 3, dtype=torch.int64)
        return EncodedImages(EncodedColumn(rows, self.column), self.decoder, nothing_measured)

    def describe(self) -> dict[str, Any]:
        """Return plain values."""
        return {"column": self.column, "decoder": vars(self.decoder)}

    @classmethod
    def from_description(cls, values: dict[str, Any]) -> ImagePreprocessing:
        """Make the preprocessing again from what `describe` returned."""
        return cls(values["column"], Decoder(**values["decoder"]))


def fit_images(
    source: str, rows: Rows, chosen: torch.Tensor, columns: Sequence[str], options: DataOptions
) -> tuple[ImagePreprocessing, list[str]]:
    """Find out what the images of the training split are.

    Args:
        source: name of the data set, for messages.
        rows: the split.
        chosen: rows that are trained on, int64.
        columns: the one column that holds images.
        options: the size asked for.

    Returns:
        The preprocessing, and lines that say what was decided.

    Raises:
        DataError: the column holds no images.
    """
    column = columns[0]
    if not holds_images(rows.data.features[column]):
        raise DataError(f"{source}: column {column!r} holds no images; name another with --input_columns")
    encoded = EncodedColumn(rows, column)
    # Not the first ones: folders are sorted by class, and one class may be all grey.
    some = chosen[:: max(1, len(chosen) // 256)].tolist()
    first, size = _first_readable(encoded, [*some, *chosen.tolist()])  # all, only where all of some are bad
    mode = color_mode(_read(encoded, [first, *some]))
    notes = []
    if options.image_size is not None:
        size = (options.image_size, options.image_size)
        notes.append(f"images are scaled, the shorter side to {size[0]} pixels, and cropped to the centre")
    return ImagePreprocessing(column, Decoder(mode, *size, options.image_size is not None)), notes


def _first_readable(encoded: EncodedColumn, rows: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """Return the first row whose image can be decoded, and its height and width."""
    for row in rows:
        with contextlib.suppress(BadImageError):  # decoding names it
            return row, upright_size(encoded.read(row))
    return rows[0], (1, 1)  # no image can be decoded either


def _read(encoded: EncodedColumn, rows: Sequence[int]) -> Iterator[bytes]:
    for row in rows:
        with contextlib.suppress(BadImageError):  # decoding names it
            yield encoded.read(row)
