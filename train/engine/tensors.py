"""The tensors of a model by clean name, whole or sharded. What wrappers add to models and names ends here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Tensors = dict[str, torch.Tensor]
Parts = Mapping[str, Mapping[str, torch.Tensor]]  # the files of a checkpoint


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DeepSpeed and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "DeepSpeedEngine":  # by its name: imported only if it was chosen
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def clean_name(name: str) -> str:
    """Strip what compile and activation checkpointing add to a parameter's name."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def named_tensors(model: nn.Module) -> tuple[Tensors, dict[str, str]]:
    """Return the live parameters and persistent buffers by clean name, and the names that alias an earlier one.

    Raises:
        ValueError: the model keeps extra state that is no tensor.
    """
    tensors: Tensors = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        name = clean_name(name)
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"the model keeps {name!r}, which is no tensor; a checkpoint cannot hold it")
        if id(value) in first_name:
            aliases[name] = first_name[id(value)]
        else:
            first_name[id(value)] = name
            tensors[name] = value
    return tensors, aliases


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole; for a sharded one all processes must take part."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full CPU tensor into a live one, sharded or not."""
    with torch.no_grad():
        target.copy_(_like(value, target))


def reshard(model: nn.Module) -> None:
    """Put the shards back in place of what a forward pass without backward left whole; for FSDP2 only."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def assign(model: nn.Module, live: Tensors, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values, whole or sharded, into the live tensors of a model.

    FSDP2 keeps the root's parameters whole after a forward pass without backward (torch 2.13), and would go on with
    those instead of what the shards become.
    """
    reshard(model)
    for name, target in live.items():
        copy_into(target, values[name])


def _like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor as `target` is. Each process holds the full one, so nothing is sent."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor) and value.shape == target.shape:
        value = value.to(target.device)
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the clean name of each parameter by its id; tied parameters have the first of their names.

    Taken from the state dict: it alone makes FSDP2 put the shards back in place of what a forward pass left whole.
    """
    return {id(value): name for name, value in named_tensors(model)[0].items()}
