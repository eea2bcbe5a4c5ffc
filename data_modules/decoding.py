"""Compressed images to pixels. Legend: N and B samples, C channels, H height, W width."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data_modules.errors import DataError

GREY_MODES = ("1", "L", "LA")


@dataclass(frozen=True)
class EncodedImages:
    """Compressed images that are decoded when they are gathered; looks like a uint8 tensor [N, C, H, W]."""

    encoded: Sequence[bytes]
    names: Sequence[str]  # where each image comes from, for messages
    mode: str
    image_size: int | None
    shape: tuple[int, ...]

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Return uint8 images [len(indices), C, H, W].

        Raises:
            DataError: an image cannot be decoded or has another size; says which.
        """
        return torch.stack([self.decode(i) for i in indices.tolist()])

    def decode(self, position: int) -> torch.Tensor:
        """Return one uint8 image [C, H, W]; raises as indexing does."""
        name = self.names[position]
        image = decode(self.encoded[position], self.mode, self.image_size, name)
        if image.shape != self.shape[1:]:
            size, usual = (f"{height} x {width}" for _, height, width in (image.shape, self.shape[1:]))
            raise DataError(
                f"{name}: is {size} pixels (height x width), the first image of the split {usual}; give --image_size N "
                "to scale all to N x N"
            )
        return image


def color_mode(encoded: Sequence[bytes]) -> str:
    """Return "L" if all images are grey, "RGB" otherwise; reads the headers of about 256 at equal distances."""
    # Not of the first ones: folders are sorted by class, and one class may be all grey.
    for image in encoded[:: max(1, len(encoded) // 256)]:
        try:
            if Image.open(io.BytesIO(image)).mode not in GREY_MODES:
                return "RGB"
        except (OSError, Image.DecompressionBombError):
            continue  # decoding names it
    return "L"


def decode(encoded: bytes, mode: str, image_size: int | None, where: str) -> torch.Tensor:
    """Decode one image to uint8 [C, H, W], upright; `image_size` scales the shorter side to it and crops the centre.

    Raises:
        DataError: the bytes are no whole image, or one of more than 8 bits a channel.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.mode.startswith(("I", "F")):
            # Pillow would cut such values off at 255 and leave a white image.
            raise ValueError(f"more than 8 bits a channel, mode {image.mode}: convert the images to 8 bits")
        ImageOps.exif_transpose(image, in_place=True)  # cameras store photographs sideways and note the angle
        if image.mode != mode:
            image = image.convert(mode)
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
        pixels = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Its own text ends in the address of a buffer.
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{where}: cannot be decoded ({reason}); replace or remove it") from error
    pixels_HWC = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])
    return pixels_HWC.permute(2, 0, 1).contiguous()
