"""Random changes of training images, a whole batch at a time on its device; each depends on (seed, epoch, index) only.

No generator is carried along: every draw is a hash of the seed, the epoch, what it is for, and the sample's index. So
batch size, order, loader processes, number of devices and a resume change no sample. Legend: B samples, C channels,
H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from data_modules.errors import DataError
from data_modules.splits import InputSpec

# SplitMix64: a stream starts at a key and goes on by GAMMA; MIX_1 and MIX_2 scramble each state into an output.
# Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# Angles and mixing weights are picked from so many equally likely values that are made once, on the CPU. Cosines and
# quantiles from a device's own functions would differ in the last bit from processor to processor.
TABLE_SIZE = 4096


class Purpose(IntEnum):
    """What a draw is for: each purpose has a stream of its own, so adding one augmentation changes no other."""

    CROP_ROW = 0
    CROP_COLUMN = 1
    FLIP = 2
    ROTATE = 3
    SCALE = 4
    CUT_ROW = 5
    CUT_COLUMN = 6
    PARTNER = 7
    WEIGHT = 8


def random_bits(seed: int, epoch: int, indices: torch.Tensor, purpose: int) -> torch.Tensor:
    """Return 64 random bits for each of the int64 `indices`, as int64 of their shape, the same on every device.

    The bits of an index are output number `index` of the SplitMix64 stream of (seed, epoch, purpose).
    """
    key = 0
    for number in (seed, epoch, purpose):
        key = _scramble(key + (number + 1) * GAMMA)
    # int64 arithmetic wraps around, which is arithmetic modulo 2**64 on the same bits.
    states = indices * _signed(GAMMA) + _signed(key + GAMMA)
    states = (states ^ _shift_right(states, 30)) * _signed(MIX_1)
    states = (states ^ _shift_right(states, 27)) * _signed(MIX_2)
    return states ^ _shift_right(states, 31)


def _scramble(state: int) -> int:
    state %= 2**64
    state = (state ^ state >> 30) * MIX_1 % 2**64
    state = (state ^ state >> 27) * MIX_2 % 2**64
    return state ^ state >> 31


def _signed(number: int) -> int:
    """Return the int64 with the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shift_right(states: torch.Tensor, places: int) -> torch.Tensor:
    # >> of int64 copies the sign bit into the free places; the mask clears them.
    return (states >> places) & (2 ** (64 - places) - 1)


def uniform(seed: int, epoch: int, indices: torch.Tensor, purpose: int) -> torch.Tensor:
    """Return a float32 in [0, 1) for each of the int64 `indices`: a multiple of 2**-24, each equally likely."""
    return _shift_right(random_bits(seed, epoch, indices, purpose), 40).float() * 2**-24


def whole_numbers(seed: int, epoch: int, indices: torch.Tensor, purpose: int, count: int) -> torch.Tensor:
    """Return one of 0..count-1, all equally likely, for each of the int64 `indices`; `count` is at most 2**31."""
    assert 1 <= count <= 2**31
    return _shift_right(random_bits(seed, epoch, indices, purpose), 32) * count >> 32


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; 0 and False leave a step out. All indices lie on the device of the images.

    The order is `pixels`, normalisation, `cut`, `mix`.
    """

    crop: int = 0
    """Largest shift along each axis, in pixels; what comes in from outside is 0."""
    flip: bool = False
    """Swap left and right of every other image."""
    rotate: float = 0.0
    """Largest angle to either side, in degrees."""
    scale: float = 0.0
    """Largest relative change of size, up or down."""
    cutout: int = 0
    """Side of the square that is blotted out, in pixels."""
    mixup: float = 0.0
    """Both parameters of the Beta distribution of mixing weights."""

    def __bool__(self) -> bool:
        return self != Augmentation()

    def check_size(self, height: int, width: int) -> None:
        """Compare with the size of the images, in pixels.

        Raises:
            ValueError: a shift could move a whole image out of sight, or a square covers all of it.
        """
        for name, pixels in (("crop", self.crop), ("cutout", self.cutout)):
            if pixels >= min(height, width):
                raise ValueError(
                    f"augmentation '{name}:{pixels}': must be below the shorter side of the images, which are "
                    f"{height} x {width} pixels (height x width)"
                )

    def pixels(self, images_BCHW: torch.Tensor, indices: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
        """Crop, flip, rotate and scale stored images, of which 0 is black.

        Args:
            images_BCHW: uint8 or float, before normalisation.
            indices: numbers of the samples in the training split, int64 [B].
            epoch: counts from 0.
            seed: of the run.

        Returns:
            New images of the same shape. Of the same type, with exact copies of pixels, without rotation and scaling;
            with them float32 in the range of the stored values. The images themselves if there is nothing to do.
        """
        if self.crop or self.flip:
            images_BCHW = self._move(images_BCHW, indices, epoch, seed)
        if self.rotate or self.scale:
            images_BCHW = self._turn(images_BCHW, indices, epoch, seed)
        return images_BCHW

    def _move(self, images_BCHW: torch.Tensor, indices: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
        batch, channels, height, width = images_BCHW.shape
        rows, columns = (torch.arange(side, device=indices.device).repeat(batch, 1) for side in (height, width))
        if self.flip:
            mirrored = whole_numbers(seed, epoch, indices, Purpose.FLIP, 2).bool()
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        if self.crop:
            images_BCHW = F.pad(images_BCHW, (self.crop,) * 4)
            shifts = 2 * self.crop + 1
            rows = rows + whole_numbers(seed, epoch, indices, Purpose.CROP_ROW, shifts)[:, None]
            columns = columns + whole_numbers(seed, epoch, indices, Purpose.CROP_COLUMN, shifts)[:, None]
        # One flat gather: 2 to 6 times as fast as indexing by rows and columns (CPU, 28 to 224 pixels a side).
        sources = rows[:, :, None] * images_BCHW.shape[3] + columns[:, None, :]
        sources = sources.view(batch, 1, height * width).expand(-1, channels, -1)
        return images_BCHW.flatten(2).gather(2, sources).view(batch, channels, height, width)

    def _turn(self, images_BCHW: torch.Tensor, indices: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
        height, width = images_BCHW.shape[2:]
        steps = whole_numbers(seed, epoch, indices, Purpose.ROTATE, TABLE_SIZE)
        zoom = 1 + self.scale * (2 * uniform(seed, epoch, indices, Purpose.SCALE) - 1)
        # Where a pixel of the result comes from: rotated the other way, and divided by the zoom.
        cosines, sines = (_rotations(self.rotate, indices.device)[:, steps] / zoom)[:, :, None, None]
        across = torch.arange(width, device=indices.device) - (width - 1) / 2
        down = (torch.arange(height, device=indices.device) - (height - 1) / 2)[:, None]
        # Not affine_grid: it multiplies matrices, whose last bits may depend on the size of the batch. grid_sample
        # counts from -1 to 1, border to border; x and y stay in planes, as interleaving them takes nearly as long as
        # sampling (0.55 and 0.62 ms, 128 x 28 x 28 pixels).
        from_x = cosines * (across * (2 / width)) + sines * (down * (2 / width))
        from_y = cosines * (down * (2 / height)) - sines * (across * (2 / height))
        grid = torch.stack((from_x, from_y)).permute(1, 2, 3, 0)
        return F.grid_sample(images_BCHW.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def cut(self, images_BCHW: torch.Tensor, indices: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
        """Set a square of each normalised image to 0, the mean.

        Its centre is any pixel, so that at the border only a part of the square lies within the image. Without
        cutout the images themselves are returned.
        """
        if not self.cutout:
            return images_BCHW
        covered = []
        for purpose, side in zip((Purpose.CUT_ROW, Purpose.CUT_COLUMN), images_BCHW.shape[2:]):
            first = whole_numbers(seed, epoch, indices, purpose, side)[:, None] - self.cutout // 2
            places = torch.arange(side, device=indices.device)
            covered.append((places >= first) & (places < first + self.cutout))
        rows, columns = covered
        return images_BCHW.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)

    def partners(self, indices: torch.Tensor, epoch: int, seed: int, num_samples: int) -> torch.Tensor:
        """Return which of the split's `num_samples` each sample is mixed with, int64 [B]; it may be itself."""
        return whole_numbers(seed, epoch, indices, Purpose.PARTNER, num_samples)

    def mix_weights(self, indices: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
        """Return the weight of each sample in its mixture, float32 [B] in [0.5, 1]; the partner gets the rest.

        It is the larger of w and 1 - w, where w follows Beta(mixup, mixup): the sample's own label dominates.
        """
        assert self.mixup
        steps = whole_numbers(seed, epoch, indices, Purpose.WEIGHT, TABLE_SIZE)
        return _dominant_weights(self.mixup, indices.device)[steps]


def mix(images_BCHW: torch.Tensor, partners_BCHW: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted means of images and their partners, both normalised; `weights` [B] are those of the first."""
    weights = weights[:, None, None, None]
    return images_BCHW * weights + partners_BCHW * (1 - weights)


@lru_cache
def _rotations(degrees: float, device: torch.device) -> torch.Tensor:
    """Return cosines and sines of angles at equal distances in (-degrees, degrees), float32 [2, TABLE_SIZE]."""
    steps = (2 * torch.arange(TABLE_SIZE, dtype=torch.float64) + 1) / TABLE_SIZE - 1
    angles = torch.deg2rad(steps * degrees)
    return torch.stack((angles.cos(), angles.sin())).float().to(device)


@lru_cache
def _dominant_weights(alpha: float, device: torch.device) -> torch.Tensor:
    """Return quantiles at equal distances of max(w, 1 - w), w of Beta(alpha, alpha), float32 [TABLE_SIZE].

    Quantiles cost one draw a sample; drawing by rejection costs an unknown number, and fails for a small alpha.
    """
    from scipy.special import betaincinv

    # w is symmetric about 1/2, so the larger of the two is distributed like w above its median.
    levels = 0.5 + (torch.arange(TABLE_SIZE, dtype=torch.float64) + 0.5) / (2 * TABLE_SIZE)
    return torch.from_numpy(betaincinv(alpha, alpha, levels.numpy())).float().to(device)


# For each word with a number: its type, which numbers it takes, and how that is said.
_NUMBERS: dict[str, tuple[type, Callable[[float], bool], str]] = {
    "crop": (int, lambda pixels: pixels >= 1, "a whole number of pixels, 1 or more"),
    "rotate": (float, lambda degrees: 0 < degrees <= 180, "degrees, above 0, at most 180"),
    "scale": (float, lambda share: 0 < share < 1, "a share, above 0 and below 1"),
    "cutout": (int, lambda pixels: pixels >= 1, "a whole number of pixels, 1 or more"),
    "mixup": (float, lambda alpha: 0 < alpha <= 100, "a number, above 0, at most 100"),
}
_ACCEPTED = "crop:4, flip, rotate:10, scale:0.1, cutout:8 and mixup:0.2, each at most once, with numbers of your choice"


def parse_augmentation(words: Sequence[str]) -> Augmentation:
    """Read words such as `crop:4`, `flip` and `mixup:0.2`; no words: an augmentation that does nothing.

    Raises:
        ValueError: a word is unknown or doubled, or its number is missing or out of range.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition(":")
        problem = None
        if name in values:
            problem = f"{name} is given twice"
        elif name == "flip":
            values[name] = True
            problem = "flip takes no number" if word != "flip" else None
        elif name in _NUMBERS:
            kind, fits, wanted = _NUMBERS[name]
            try:
                values[name] = kind(text)
            except ValueError:
                values[name] = 0
            problem = None if fits(values[name]) else f"{name} takes {wanted}"
        else:
            problem = "unknown"
        if problem is not None:
            raise ValueError(f"augmentation {word!r}: {problem}. Accepted: {_ACCEPTED}")
    return Augmentation(**values)


def build_augmentation(words: Sequence[str]) -> Augmentation:
    """Return the random changes that --augment names.

    Raises:
        DataError: there is no such change, or its strength makes no sense.
    """
    try:
        return parse_augmentation(words)
    except ValueError as error:
        raise DataError(f"--augment: {error}") from error


def check_augmentation(augmentation: Augmentation, inputs: InputSpec) -> None:
    """Refuse random changes that cannot be made to these samples.

    Raises:
        DataError: says which, and why.
    """
    if augmentation and inputs.task != "image":
        raise DataError(f"--augment: changes images, but the samples are {inputs.task}; leave it out")
    try:
        if augmentation:
            augmentation.check_size(*inputs.shape[1:])
    except ValueError as error:
        raise DataError(f"--augment: {error}") from error
