"""Building the optimizer."""

from __future__ import annotations

import torch
from torch import nn

from train.engine.settings import TrainSettings


def build_optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over all trainable parameters, with torch's fused kernels.

    The fused kernels update all parameters in one call, and can leave them alone on the device's own decision, so
    that the check for NaN needs no waiting.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay, nesterov=True, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, rate, weight_decay=decay, fused=True)
