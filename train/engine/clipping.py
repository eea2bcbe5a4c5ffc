"""The norm of all gradients together, and limiting it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from train.engine.tensors import full


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients so that their norm is at most `limit`, if that is above 0; return their norm before.

    On a CPU, where looking is free, numbers take the place of tensors, and gradients that are clearly small enough are
    not multiplied by 1: half the cost of `torch.nn.utils`, which a small network would notice.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or gradients[0].device.type != "cpu" or isinstance(gradients[0], DTensor):
        norm = nn.utils.get_total_norm(gradients)
        if limit > 0:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return full(norm)
    total = math.hypot(*(norm.item() for norm in torch._foreach_norm(gradients)))
    if limit > 0 and not total < 0.99 * limit - 1e-5:
        torch._foreach_mul_(gradients, min(1.0, limit / (total + 1e-6)))
    return torch.tensor(total)
