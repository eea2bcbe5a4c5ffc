"""Convolutional autoencoder. Legend: B batch, C channels, H height, W width, Z numbers of the bottleneck."""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import nn

SMALLEST_SIDE = 8
MAX_HALVINGS = 5


class ConvAutoencoder(nn.Module):
    """Strided convolutions - linear to the bottleneck - linear - transposed convolutions - sigmoid, with no skips.

    Images [B, C, H, W] in [0, 1] to images of the same shape in (0, 1). Each convolution, 4 x 4 with GELU, halves the
    sides; the first has `width` channels, the second twice as many, all others four times. Small images are halved
    until 4 to 7 pixels are left, large ones 5 times. Without normalisation, samples of a batch do not influence each
    other.

    With `vae`, the encoder gives mean and log-variance of a normal distribution for each number. Training decodes a
    sample of it, drawn from torch's global generator; evaluation decodes the mean.

    Raises:
        ValueError: the samples are no images, or of a size that cannot be halved so often.
    """

    def __init__(
        self, input_shape: tuple[int, ...] = (1, 28, 28), bottleneck: int = 32, width: int = 32, vae: bool = False
    ) -> None:
        super().__init__()
        channels, height, width_pixels = _check_size(input_shape)
        halvings = _count_halvings(height, width_pixels)
        depths = [channels, *(width * min(2**stage, 4) for stage in range(halvings))]
        self.smallest = (depths[-1], height >> halvings, width_pixels >> halvings)
        flat = depths[-1] * self.smallest[1] * self.smallest[2]
        self.vae = vae
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for before, after in pairwise(depths):
            encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GELU()]
            decoder = [nn.GELU(), nn.ConvTranspose2d(after, before, 4, stride=2, padding=1), *decoder]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(flat, bottleneck * (2 if vae else 1)))
        self.decoder = nn.Sequential(nn.Linear(bottleneck, flat), nn.Unflatten(1, self.smallest), *decoder)
        for layer in self.modules():
            # Torch's own initial weights shrink the signal at each layer: after 4 epochs at 1e-3 digits of 64 x 64
            # pixels came back with a test MSE of 0.0118, not 0.0068.
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                inputs = layer.in_channels * (16 if isinstance(layer, nn.Conv2d) else 4)  # that one output is made of
                nn.init.normal_(layer.weight, std=(2 / inputs) ** 0.5)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch 2.13's stub lacks it

    def forward(
        self, images_BCHW: torch.Tensor, with_kl: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return reconstructions [B, C, H, W], and `with_kl`, of a VAE, the divergence from N(0, 1) in nats, [B].

        The divergence is returned here because DistributedDataParallel and compile know no other method than this.
        """
        encoded = self.encoder(images_BCHW.contiguous(memory_format=torch.channels_last))
        if not self.vae:
            assert not with_kl, "only a VAE has a divergence"
            return self.decode(encoded)
        mean_BZ, log_variance_BZ = encoded.float().chunk(2, dim=1)
        deviation_BZ = (log_variance_BZ / 2).exp()
        drawn_BZ = mean_BZ + deviation_BZ * torch.randn_like(mean_BZ) if self.training else mean_BZ
        images = self.decode(drawn_BZ)
        if not with_kl:
            return images
        return images, (mean_BZ.square() + deviation_BZ.square() - 1 - log_variance_BZ).sum(dim=1) / 2

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the bottleneck, of a VAE their means, [B, Z]."""
        encoded: torch.Tensor = self.encoder(images_BCHW.contiguous(memory_format=torch.channels_last))
        return encoded.chunk(2, dim=1)[0] if self.vae else encoded

    def decode(self, numbers_BZ: torch.Tensor) -> torch.Tensor:
        """Return the images [B, C, H, W] in (0, 1) that these numbers stand for."""
        # In float32: a sigmoid in bf16 rounds light grey to white.
        return torch.sigmoid(self.decoder(numbers_BZ).float())


def _check_size(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(f"conv_autoencoder needs images, the samples have shape {input_shape}")
    channels, height, width = input_shape
    size = f"{height} x {width}"
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"conv_autoencoder needs images of {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more, these are {size}"
        )
    stride = 2 ** _count_halvings(height, width)
    if height % stride or width % stride:
        # Rounded up, the smaller side may be large enough for one more halving, which the other does not stand.
        near = product(*({side - side % stride, side + -side % stride} for side in (height, width)))
        fitting = [pair for pair in near if not any(side % 2 ** _count_halvings(*pair) for side in pair)]
        # The same aspect first: squares stay squares.
        fitting.sort(key=lambda pair: (abs(pair[0] * width - pair[1] * height), pair))
        nearest = " or ".join(f"{pair[0]} x {pair[1]}" for pair in fitting[:2])
        raise ValueError(
            f"conv_autoencoder needs sides that are multiples of {stride}, these are {size}; resize to {nearest}"
        )
    return channels, height, width


def _count_halvings(height: int, width: int) -> int:
    return min(MAX_HALVINGS, (min(height, width) // 4).bit_length() - 1)
