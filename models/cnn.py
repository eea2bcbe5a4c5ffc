"""Convolutional classifiers. Legend: B batch, C channels, H height, W width."""

from __future__ import annotations

import torch
from torch import nn


def check_size(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """Return the shape as (C, H, W).

    Raises:
        ValueError: the samples are no images, or smaller than `smallest` pixels a side.
    """
    if len(input_shape) != 3:
        raise ValueError(f"{name} needs images, the samples have shape {input_shape}; try --model mlp")
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ValueError(f"{name} needs images of {smallest} x {smallest} pixels or more, these are {height} x {width}")
    return channels, height, width


class MnistCNN(nn.Module):
    """conv32 - conv64 - pool - dropout 0.25 - linear 128 - dropout 0.5 - linear: images [B, C, H, W] to logits.

    Source: the network of PyTorch's MNIST example, known for 99 % after a dozen epochs.
    """

    def __init__(self, input_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        channels, height, width = check_size("mnist_cnn", input_shape, 6)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)
        )
        flat = 64 * ((height - 4) // 2) * ((width - 4) // 2)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes)
        )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, num_classes]."""
        logits: torch.Tensor = self.classifier(self.features(images_BCHW))
        return logits


class SimpleCNN(nn.Module):
    """conv32 - pool - conv64 - pool - linear 128 - linear: images of any size and channels to logits."""

    def __init__(self, input_shape: tuple[int, ...] = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__()
        channels, height, width = check_size("simple_cnn", input_shape, 4)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        flat = 64 * (height // 4) * (width // 4)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, num_classes))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, num_classes]."""
        logits: torch.Tensor = self.classifier(self.features(images_BCHW))
        return logits


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises a single value a channel, as the last sample of an epoch may leave, by its averages.

    torch refuses such an input, whose variance is none.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        """Return the input, normalised, [B, C, H, W]."""
        if self.training and input[:, 0].numel() == 1:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


class FastCNN(nn.Module):
    """conv16 5x5 - pool 3 - conv64 - pool 2 - conv96 - linear, with batch norm and GELU: small grey or colour images
    of 28 pixels a side or more to logits.

    Pooling comes before norm and activation, which then have less to do; channels_last is 1.4 times faster on CPUs.
    """

    def __init__(self, input_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        channels, height, width = check_size("fast_cnn", input_shape, 28)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 5, bias=False), nn.MaxPool2d(3), BatchNorm(16), nn.GELU(),
            nn.Conv2d(16, 64, 3, bias=False), nn.MaxPool2d(2), BatchNorm(64), nn.GELU(),
            nn.Conv2d(64, 96, 3, bias=False), BatchNorm(96), nn.GELU(),
        )  # fmt: skip
        self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch 2.13's stub lacks it
        flat = 96 * (((height - 4) // 3 - 2) // 2 - 2) * (((width - 4) // 3 - 2) // 2 - 2)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(flat, num_classes))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, num_classes]."""
        return self.classifier(self.features(images_BCHW.contiguous(memory_format=torch.channels_last)))
