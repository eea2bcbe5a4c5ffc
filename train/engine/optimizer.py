"""Building the optimizer."""

from __future__ import annotations

import torch
from torch import nn

from train.engine.settings import TrainSettings


def build_optimizer(settings: TrainSettings, model: nn.Module, *, sharded: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer over all trainable parameters, with torch's fused kernels where there are any.

    The fused kernels update all parameters in one call, and can leave them alone on the device's own decision, so
    that the check for NaN needs no waiting. Weight decay is for matrices and filters; biases and the scales of norms
    have none.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        fused = not sharded  # the fused kernel of SGD takes no DTensor (torch 2.13)
        return torch.optim.SGD(groups, settings.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.learning_rate, fused=True)
