"""What the settings make of a model before a run is opened: what of it is trained, and how."""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from torch import nn

from train.engine.errors import UsageError
from train.engine.freezing import freeze
from train.engine.muon import hidden_matrices
from train.engine.recompute import recompute_blocks
from train.engine.runtime import Runtime
from train.engine.settings import TrainSettings


def adapt_model(settings: TrainSettings, runtime: Runtime, model: nn.Module) -> None:
    """Freeze, lay out and cut a model as the settings say; refuse what it or the launcher's wrapper cannot do.

    Raises:
        UsageError: says what, and what to do instead.
    """
    _check_wrapper(settings, runtime)
    if settings.freeze:
        freeze(model, settings.freeze)
    if settings.optimizer == "muon":
        hidden_matrices(model)
    if settings.channels_last:
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise UsageError(
                f"--channels_last: is for convolutions of images, and {type(model).__name__} has none; leave it out"
            )
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch 2.13's stub lacks it
    if settings.gradient_checkpointing:
        recompute_blocks(model)


def _check_wrapper(settings: TrainSettings, runtime: Runtime) -> None:
    """Refuse what cannot be had with FSDP or DeepSpeed."""
    accelerator = runtime.accelerator
    if not accelerator.is_fsdp2 and accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if settings.reduction == "exact":
        raise UsageError(
            "--reduction exact adds whole gradients, which no process has with FSDP or DeepSpeed: leave one out"
        )
    if settings.optimizer == "muon":
        raise UsageError(
            "--optimizer muon works on whole matrices, which no process has with FSDP or DeepSpeed: use adamw"
        )
    if settings.channels_last:
        raise UsageError("--channels_last: FSDP and DeepSpeed lay weights out by themselves: leave it out")
    if settings.gradient_checkpointing and accelerator.is_fsdp2:
        raise UsageError(
            "--gradient_checkpointing: FSDP does it by its own rule: set fsdp_activation_checkpointing in the file of "
            "launch/ instead"
        )
