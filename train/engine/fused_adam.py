"""A step of Adam or AdamW on a CPU, without what torch.optim does around its kernel."""

from __future__ import annotations

from typing import Any

import torch

KERNELS = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}


@torch.no_grad()
def update_weights(optimizer: torch.optim.Optimizer) -> None:
    """Update the weights as `optimizer.step()` does, to the bit.

    With fused kernels on plain tensors the kernel is called at once. torch.optim (2.13) first tells the profiler, looks
    for hooks, and sorts tensors by device and type: 0.1 ms, a twelfth of a step of a small network. The first step,
    which makes the moments, and every other kind of optimizer, are left to torch.
    """
    kernel = KERNELS.get(type(optimizer))
    groups, states = optimizer.param_groups, optimizer.state
    count = sum(len(group["params"]) for group in groups)
    if kernel is None or len(states) < count or not all(_is_plain(group) for group in groups):
        optimizer.step()
        return
    for group in groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        moments = [states[parameter] for parameter in parameters]
        steps = [moment["step"] for moment in moments]
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        kernel(
            parameters,
            [parameter.grad for parameter in parameters],
            [moment["exp_avg"] for moment in moments],
            [moment["exp_avg_sq"] for moment in moments],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )


def _is_plain(group: dict[str, Any]) -> bool:
    return group["fused"] and not group["amsgrad"] and all(type(each) is torch.nn.Parameter for each in group["params"])
