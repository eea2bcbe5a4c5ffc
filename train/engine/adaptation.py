"""What the settings make of a model before a run is opened: what of it is trained, and how."""

from __future__ import annotations

from accelerate.utils import DistributedType
from torch import nn

from train.engine.errors import UsageError
from train.engine.freezing import freeze
from train.engine.muon import hidden_matrices
from train.engine.runtime import Runtime
from train.engine.settings import TrainSettings


def adapt_model(settings: TrainSettings, runtime: Runtime, model: nn.Module) -> None:
    """Freeze what is to be frozen, and refuse what this model or the launcher's wrapper cannot do.

    Raises:
        UsageError: says what, and what to do instead.
    """
    _check_wrapper(settings, runtime)
    if settings.freeze:
        freeze(model, settings.freeze)
    if settings.optimizer == "muon":
        hidden_matrices(model)


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
