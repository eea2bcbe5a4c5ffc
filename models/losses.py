"""Losses and scores of reconstructed images. Legend: B batch, C channels, H height, W width, N planes (B times C).

Two images x and y enter SSIM by their sum p = x + y and their difference m = x - y: with mean() and var() under the
Gaussian window,

    1 - luminance = 2 mean(m)² / (mean(p)² + mean(m)² + 2 C1)
    1 - contrast  = 2 var(m) / (var(p) + var(m) + 2 C2)

is the usual definition, written so that equal images give 0 without rounding, and with four windowed means, not five.
Source: Wang, Bovik, Sheikh, Simoncelli 2004, Image quality assessment: from error visibility to structural similarity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WINDOW = 11  # pixels a side
SIGMA = 1.5  # pixels
TWO_C1, TWO_C2 = 2 * 0.01**2, 2 * 0.03**2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, finest scale first
SMALLEST_TERM = 1e-4
# Columns of one product with the banded matrix: 32 to 96 are equally fast (AVX-512, one core, 256 pixels), 1.7 times as
# fast as the whole matrix at once. Depthwise convolutions took 9 times as long (groups of four), or 2 to 3 times with
# all planes as channels and channels_last.
TILE = 64


def ssim(images_BCHW: torch.Tensor, targets_BCHW: torch.Tensor, reduction: str = "none") -> torch.Tensor:
    """Return the structural similarity of images in [0, 1], at most 1: per image [B], or with "mean" one number.

    The mean over channels and over those pixels around which the 11 x 11 window, a Gaussian of sigma 1.5, lies inside
    the image. Computed in float32 for every smaller type, and under autocast; of float64 in float64. A program that
    lets float32 products be rounded (`torch.set_float32_matmul_precision`) loses digits here as well.

    Raises:
        ValueError: the two differ in shape, are not floats [B, C, H, W], or are smaller than the window.
    """
    if reduction not in ("none", "mean"):
        raise ValueError(f"reduction is none or mean, not {reduction}")
    similarity_B = 1 - _measure_dissimilarity(images_BCHW, targets_BCHW)
    return similarity_B.mean() if reduction == "mean" else similarity_B


def ms_ssim(images_BCHW: torch.Tensor, targets_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the multi-scale structural similarity of images in [0, 1], per image [B].

    For each channel the product of the contrast terms of four scales and of the SSIM of the fifth, each to the power of
    its weight; then the mean over channels. Each scale halves the one before by 2 x 2 means; of an odd side, the last
    pixels are averaged alone. Terms below 1e-4, negative ones among them, count as 1e-4 and pass no gradient: the power
    of a negative term is not a number, and the slope at 0 is infinite.

    Source: Wang, Simoncelli, Bovik 2003, Multiscale structural similarity for image quality assessment.

    Raises:
        ValueError: as `ssim`, or the smaller side is not above 160 pixels.
    """
    images, targets = _check_pair(images_BCHW, targets_BCHW)
    halvings = len(SCALE_WEIGHTS) - 1
    smallest = (WINDOW - 1) * 2**halvings + 1
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"MS-SSIM needs images of {smallest} pixels a side or more, these are {_say_size(images)}")
    product = images.new_ones(())
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            images, targets = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (images, targets))
        term_N = 1 - _Dissimilarity.apply(images, targets, scale == halvings)
        product = product * term_N.clamp(min=SMALLEST_TERM) ** weight
    return product.view(images.shape[:2]).mean(dim=1)


def psnr(images_BCHW: torch.Tensor, targets_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of images in [0, 1], per image [B], in dB; equal images give infinity."""
    return -10 * torch.log10(_measure_error(*_check_pair(images_BCHW, targets_BCHW)))


def reconstruction_loss(
    images_BCHW: torch.Tensor,
    targets_BCHW: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    multi_scale: bool = False,
    with_ssim: bool = False,
) -> dict[str, torch.Tensor]:
    """Return "loss", alpha * MSE + beta * (1 - SSIM), and its parts "mse" and "ssim", each per image [B].

    "mse" is the mean over channels and pixels; "ssim" is the similarity itself, higher is better. With `multi_scale`
    the loss has "ms_ssim" in its place. "ssim" is there if the loss is made of it, or else `with_ssim`, without
    gradient.

    Raises:
        ValueError: as `ssim`.
    """
    # Once for both parts: the slopes of a smaller type would otherwise be rounded before they are added.
    images, targets = _check_pair(images_BCHW, targets_BCHW)
    mse_B = _measure_error(images, targets)
    parts = {"loss": alpha * mse_B, "mse": mse_B}
    if beta and multi_scale:
        parts["ms_ssim"] = ms_ssim(images, targets)
        parts["loss"] = parts["loss"] + beta * (1 - parts["ms_ssim"])
    elif beta:
        dissimilarity_B = _measure_dissimilarity(images, targets)
        parts["loss"] = parts["loss"] + beta * dissimilarity_B
        parts["ssim"] = 1 - dissimilarity_B
    if with_ssim and "ssim" not in parts:
        parts["ssim"] = 1 - _measure_dissimilarity(images.detach(), targets.detach())
    return parts


def _measure_error(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (images - targets).square().mean(dim=(1, 2, 3))


def _measure_dissimilarity(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return 1 - SSIM, [B]."""
    images, targets = _check_pair(images, targets)
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of {WINDOW} x {WINDOW} pixels or more, these are {_say_size(images)}")
    return _Dissimilarity.apply(images, targets, True).view(images.shape[:2]).mean(dim=1)


def _check_pair(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both in float32, or float64 if one is."""
    if images.ndim != 4 or images.shape != targets.shape:
        raise ValueError(
            f"two batches of images [B, C, H, W] are compared, not {list(images.shape)} and {list(targets.shape)}"
        )
    if not (images.is_floating_point() and targets.is_floating_point()):
        raise ValueError(f"images in [0, 1] are floats, these are {images.dtype} and {targets.dtype}")
    dtype = torch.promote_types(torch.promote_types(images.dtype, targets.dtype), torch.float32)
    return images.to(dtype), targets.to(dtype)


def _say_size(images: torch.Tensor) -> str:
    return f"{images.shape[2]} x {images.shape[3]}"


class _Dissimilarity(torch.autograd.Function):
    """1 - SSIM per plane [N], or without `luminance` 1 - contrast, of float images [B, C, H, W].

    All products have an `out`, which autocast leaves alone. The slopes are computed with the value, while what they are
    made of is at hand.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, targets: torch.Tensor, luminance: bool) -> torch.Tensor:
        """Return the mean over each plane's interior pixels."""
        (B, C, H, W), N = images.shape, images.shape[0] * images.shape[1]
        moments = images.new_empty(4, B, C, H, W)  # p, m, p², m²
        torch.add(images, targets, out=moments[0])
        torch.sub(images, targets, out=moments[1])
        # No variance depends on a constant, but its rounding does: around 0, a bright flat image loses no digits.
        centres = moments[:2].mean(dim=(3, 4), keepdim=True)
        moments[:2] -= centres
        torch.mul(moments[:2], moments[:2], out=moments[2:])
        bands = _build_band(moments, H), _build_band(moments, W)
        means = _filter_planes(moments.view(4 * N, H, W), *bands).unflatten(1, (4, N))
        p, m, pp, mm = means.unbind(1)  # [W', N, H'], as all maps below
        whole_p, whole_m = (part + centre.view(N, 1) for part, centre in zip((p, m), centres.unbind(0)))

        variance_m = mm.addcmul_(m, m, value=-1)
        contrast_bottom = pp.addcmul_(p, p, value=-1).add_(variance_m).add_(TWO_C2)
        contrast_loss = variance_m.mul_(2).div_(contrast_bottom)
        power_m = whole_m * whole_m
        luminance_bottom = torch.addcmul(power_m, whole_p, whole_p).add_(TWO_C1)
        luminance_loss = power_m.mul_(2).div_(luminance_bottom) if luminance else power_m.zero_()
        rest = 1 - luminance_loss
        loss_N = torch.addcmul(luminance_loss, rest, contrast_loss).mean(dim=(0, 2))

        if any(ctx.needs_input_grad):
            # Slopes of a map's pixel by each of the four means, those by mean(p) and mean(m) halved.
            slopes = means.new_empty(means.shape[0], 4 if ctx.needs_input_grad[1] else 3, *means.shape[2:])
            by_p_and_m, by_pp, by_mm = slopes.unbind(1)[:3]
            share = rest.div_(contrast_bottom)
            torch.mul(share, contrast_loss, out=by_pp).neg_()
            torch.add(by_pp, share, alpha=2, out=by_mm)
            share = (1 - contrast_loss).div_(luminance_bottom) if luminance else share.zero_()
            by_p = luminance_loss.mul_(share).neg_()
            by_m = share.mul_(2).add_(by_p).mul_(whole_m).addcmul_(by_mm, m, value=-1)
            by_p = by_p.mul_(whole_p).addcmul_(by_pp, p, value=-1)
            # By an image, the sum of both counts; by a target, the difference.
            torch.add(by_p, by_m, out=by_p_and_m)
            if ctx.needs_input_grad[1]:
                torch.sub(by_p, by_m, out=slopes[:, 3])
            ctx.save_for_backward(moments[:2], slopes, *bands)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_N: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Return the slopes by images and targets, [B, C, H, W]."""
        (p, m), slopes, *bands = ctx.saved_tensors
        B, C, H, W = p.shape
        back = _filter_back(slopes.flatten(1, 2), *bands).view(slopes.shape[1], B, C, H, W)
        scale = (slope_N * (2 / (slopes.shape[0] * slopes.shape[3]))).view(B, C, 1, 1)
        by_p, by_m = back[1].mul_(p), back[2].mul_(m)
        by_images = (back[0] + by_p).add_(by_m).mul_(scale) if ctx.needs_input_grad[0] else None
        by_targets = (back[3] + by_p).sub_(by_m).mul_(scale) if ctx.needs_input_grad[1] else None
        return by_images, by_targets, None


def _filter_planes(planes: torch.Tensor, band_H: torch.Tensor, band_W: torch.Tensor) -> torch.Tensor:
    """Return the windowed means of planes [N, H, W], transposed: [W - 10, N, H - 10].

    Each direction is a product with a banded matrix. The first is written transposed: its other direction is then last.
    """
    N, H, W = planes.shape
    half = planes.new_empty(W - WINDOW + 1, N, H)
    _multiply_banded(planes.flatten(0, 1), band_W, half.flatten(1).T)
    full = planes.new_empty(W - WINDOW + 1, N, H - WINDOW + 1)
    _multiply_banded(half.flatten(0, 1), band_H, full.flatten(0, 1))
    return full


def _filter_back(maps: torch.Tensor, band_H: torch.Tensor, band_W: torch.Tensor) -> torch.Tensor:
    """Return planes [N, H, W] from their maps [W - 10, N, H - 10]: the transpose of `_filter_planes`."""
    N, H, W = maps.shape[1], len(band_H), len(band_W)
    half = maps.new_empty(W - WINDOW + 1, N, H)
    _multiply_banded(maps.flatten(0, 1), band_H.T, half.flatten(0, 1))
    full = maps.new_empty(N, H, W)
    _multiply_banded(half.flatten(1).T, band_W.T, full.flatten(0, 1))
    return full


def _build_band(like: torch.Tensor, side: int) -> torch.Tensor:
    """Return the matrix [side, side - 10] whose column k holds the window in rows k to k + 10."""
    # Rounded only at the end: a sum that is off 1 by 1e-7 costs a digit of SSIM where a flat part is near an edge.
    window = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    window = (window / window.sum()).to(like.dtype).to(like.device, non_blocking=True)
    columns = side - WINDOW + 1
    # Rows one longer than the side move the window on by one when they are cut to it.
    return F.pad(window, (0, columns)).repeat(columns)[: columns * side].view(columns, side).T


def _multiply_banded(rows: torch.Tensor, band: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows [R, I] times a band [I, O], or the transpose of one, to out [R, O]."""
    num_in, num_out = band.shape
    before, after = (0, WINDOW - 1) if num_in > num_out else (WINDOW - 1, 0)
    for start in range(0, num_out, TILE):
        stop = min(start + TILE, num_out)
        low, high = max(start - before, 0), min(stop + after, num_in)
        torch.mm(rows[:, low:high], band[low:high, start:stop], out=out[:, start:stop])
