"""Compressed images to pixels. Legend: N and B samples, C channels, H height, W width."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from data_modules.errors import DataError

GREY_MODES = ("1", "L", "LA")


@dataclass(frozen=True)
class EncodedImages:
    """Compressed images that are decoded when they are gathered; looks like a uint8 tensor [N, C, H, W]."""

    encoded: Sequence[bytes]
    mode: str
    image_size: int | None
    shape: tuple[int, ...]

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Return uint8 images [len(indices), C, H, W]."""
        return torch.stack([decode(self.encoded[i], self.mode, self.image_size, f"image {i}") for i in indices.tolist()])


def color_mode(encoded: Iterable[bytes]) -> str:
    """Return "L" if all images are grey, "RGB" otherwise; only headers are read."""
    for image in encoded:
        try:
            if Image.open(io.BytesIO(image)).mode not in GREY_MODES:
                return "RGB"
        except OSError:
            continue  # decoding names it, with its row
    return "L"


def decode(encoded: bytes, mode: str, image_size: int | None, where: str) -> torch.Tensor:
    """Decode one image to uint8 [C, H, W]; `image_size` scales the shorter side to it and crops the centre.

    Raises:
        DataError: the bytes are no whole image.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.mode != mode:
            image = image.convert(mode)
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
        pixels = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: cannot be decoded ({error})") from error
    pixels_HWC = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])
    return pixels_HWC.permute(2, 0, 1).contiguous()
