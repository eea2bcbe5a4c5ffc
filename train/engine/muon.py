"""Muon for the hidden matrices of a model, together with AdamW for everything else.

Source: torch.optim.Muon (torch 2.13), with the scaling of "Muon is Scalable for LLM Training" (Liu et al. 2025), after
which one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.engine.errors import UsageError


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface: groups of Muon first, then those of AdamW, and one state.

    Neither has a fused form here: torch has none of Muon, and the loop asks one question of all groups.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], learning_rate: float) -> None:
        """Build both.

        Args:
            matrices: groups of hidden matrices.
            others: groups of all other parameters.
            learning_rate: of both.
        """
        muon = torch.optim.Muon(matrices, learning_rate, adjust_lr_fn="match_rms_adamw")
        self._parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self._parts.append(torch.optim.AdamW(others, learning_rate))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        # Linked anew at each step: loading a state dict, as Accelerate does, puts other groups and states in place.
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            part.step()
            start = end


def hidden_matrices(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that are for Muon: trainable matrices, without embeddings and the output layer.

    The output layer is the last weight of the model that is no embedding. Filters of convolutions have four dimensions
    and are no matrices.

    Raises:
        UsageError: there are none.
    """
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [weight for weight in model.parameters() if weight.ndim > 1 and id(weight) not in embedded]
    found = {id(weight) for weight in weights[:-1] if weight.ndim == 2 and weight.requires_grad}
    if not found:
        raise UsageError(
            "--optimizer muon: it is for matrices in the midst of a model, and among the trainable parameters of this "
            "one there are none; use adamw"
        )
    return found
