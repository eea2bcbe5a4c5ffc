"""Multilayer perceptron for points and small images."""

from __future__ import annotations

from math import prod

import torch
from torch import nn


class MLP(nn.Module):
    """Two linear layers with ReLU between them: any input shape, flattened, to class logits [B, num_classes]."""

    def __init__(self, input_shape: tuple[int, ...] = (2,), num_classes: int = 2, hidden_size: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(prod(input_shape), hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, num_classes),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, num_classes]."""
        logits: torch.Tensor = self.layers(inputs)
        return logits
