"""Compressed images to pixels. Legend: N and B samples, C channels, H height, W width."""

from __future__ import annotations

import contextlib
import io
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

from data_modules.errors import DataError
from data_modules.rows import Rows
from data_modules.splits import Batch, fingerprint_tensors

GREY_MODES = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I")
# What Pillow raises for damaged images.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


class BadImageError(ValueError):
    """An image that cannot be used: what is wrong with it, without its place."""


class BadRowError(DataError):
    """A row that turns out to be of no use when its turn comes."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Decoder:
    """What an image becomes: `mode` "L" or "RGB", uint8, upright, transparent parts white.

    With `resize`, the shorter side is scaled to the size asked for and the centre is cropped; without, images of
    another size are refused.
    """

    mode: str
    height: int
    width: int
    resize: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return 1 if self.mode == "L" else 3, self.height, self.width

    def decode(self, encoded: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Decode one image to uint8 [C, H, W].

        Raises:
            BadImageError: the bytes are no whole image, or one that is too large or not of 8 or 16 bits.
            DataError: it has another size than the others; that is no fault of one sample.
        """
        try:
            image = ImageOps.exif_transpose(_open(encoded))  # cameras store photographs sideways and note the angle
            image = _to_mode(image, self.mode)
            if self.resize:
                image = ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)
        except UNREADABLE as error:
            # Its own text ends in the address of a buffer.
            reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise BadImageError(f"cannot be decoded ({reason})") from error
        if (image.height, image.width) != (self.height, self.width):
            raise DataError(
                f"is {image.height} x {image.width} pixels (height x width), the first image {self.height} x "
                f"{self.width}; train with --image_size N to scale all to N x N"
            )
        pixels = np.asarray(image)
        return pixels[None] if self.mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def upright_size(encoded: bytes) -> tuple[int, int]:
    """Return height and width of an image, as it is seen; decodes it, for headers swap the sides in their own ways.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        image = ImageOps.exif_transpose(_open(encoded))
    except UNREADABLE as error:
        raise BadImageError("cannot be decoded") from error
    return image.height, image.width


def _open(encoded: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # A header of a few bytes can ask for gigabytes. Pillow warns from 89 million pixels on; here it is an error.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(encoded))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its values are floating point: convert the images to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would cut values above 255 off and leave a white image.
        values = np.asarray(image).astype(np.int64)
        if values.max() > 65535 or values.min() < 0:
            raise ValueError("its values have more than 16 bits: convert the images to 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        # The colour of transparent pixels is arbitrary, and often not what anybody has seen.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def color_mode(encoded: Iterable[bytes]) -> str:
    """Return "L" if all images are grey, "RGB" otherwise; reads headers only."""
    for image in encoded:
        try:
            if _open(image).mode not in GREY_MODES:
                return "RGB"
        except UNREADABLE:
            continue  # decoding names it
    return "L"


class EncodedColumn:
    """The compressed images of a column: in the table, or in files that it names."""

    def __init__(self, rows: Rows, column: str) -> None:
        import datasets

        self.rows = rows
        table = rows.data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        # Kept in the pieces in which they are stored: one array for all would be a copy, and can hold 2 GB at most.
        chunks = table.with_format("arrow")[:].column(column).chunks
        # Flattened, not by field: that would show what lies under a missing cell.
        self._chunks = [tuple(chunk.flatten()) for chunk in chunks]  # bytes and path
        self._ends = list(accumulate(len(chunk) for chunk in chunks))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> bytes:
        """Return a compressed image.

        Raises:
            BadImageError: there is none, or its file cannot be read.
        """
        encoded = self._cell(row)[0]
        if encoded.is_valid:
            return bytes(encoded.as_buffer())
        path = self.path(row)
        if path is None:
            raise BadImageError("has no image")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise BadImageError(f"{path} cannot be read ({error.strerror})") from error

    def path(self, row: int) -> str | None:
        """Return the file that holds an image; None if the table does."""
        encoded, name = self._cell(row)
        path: str | None = None if encoded.is_valid else name.as_py()
        return path

    def _cell(self, row: int) -> tuple[Any, Any]:
        number = bisect_right(self._ends, row)
        place = row - (self._ends[number - 1] if number else 0)
        return self._chunks[number][0][place], self._chunks[number][1][place]

    def stamp(self) -> str:
        """Return a checksum that changes when an image does: of its bytes, or of its file's path, size and time."""
        digest = xxhash.xxh3_128()
        for encoded, paths in self._chunks:
            for place, value in enumerate(encoded):  # 4 millionths of a second each
                if value.is_valid:
                    buffer = value.as_buffer()
                    digest.update(buffer.size.to_bytes(8, "little"))
                    digest.update(memoryview(buffer))
                    continue
                path = paths[place].as_py()
                digest.update(f"{path}\n".encode())
                if path is not None:
                    with contextlib.suppress(OSError):  # decoding names it
                        status = Path(path).stat()
                        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def decode(self, row: int, decoder: Decoder) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return one uint8 image [C, H, W].

        Raises:
            BadImageError: it cannot be used; the problem starts with the file's name, if it has one.
            DataError: it has another size than the others; says which.
        """
        encoded = self.read(row)
        path = self.path(row)
        try:
            return decoder.decode(encoded)
        except BadImageError as error:
            raise BadImageError(f"{path} {error}" if path else f"the image {error}") from error
        except DataError as error:
            raise DataError(f"{self.rows.where(row)}: {path or 'the image'} {error}") from error


@dataclass(frozen=True)
class EncodedImages:
    """Images that are decoded each time they are gathered, for sets too large to keep decoded."""

    column: EncodedColumn
    decoder: Decoder
    measured_NC3: torch.Tensor  # of each channel: sum of the pixels, of their squares, checksum; int64

    def __len__(self) -> int:
        return len(self.column)

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return {"inputs": uint8 [B, C, H, W]}.

        Raises:
            BadRowError: an image of a stream cannot be decoded, or one that could be when the run began.
        """
        images_BCHW = np.zeros((len(indices), *self.decoder.shape), dtype=np.uint8)
        for position, row in enumerate(indices.tolist()):
            try:
                images_BCHW[position] = self.column.decode(row, self.decoder)
            except BadImageError as error:
                raise BadRowError(f"{self.column.rows.where(row)}: {error}", row) from error
        return {"inputs": torch.from_numpy(images_BCHW)}

    def fingerprint(self) -> str:
        """Return a checksum of all pixels."""
        return fingerprint_tensors(self.measured_NC3)
