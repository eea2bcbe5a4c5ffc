"""Building the optimizer, and its exact image on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from train.engine.muon import MuonWithAdamW, hidden_matrices
from train.engine.settings import TrainSettings
from train.engine.tensors import Tensors, copy_into, parameter_names

# Numbers that torch.optim keeps on the CPU unless the optimizer is fused or capturable (torch 2.13).
COUNTERS = ("step", "mu_product")
# Settings that say how a step is computed, not which; FSDP2, say, does not have all of them.
_KERNELS = ("foreach", "fused", "capturable", "differentiable")


def build_optimizer(settings: TrainSettings, model: nn.Module, *, sharded: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer over all trainable parameters, with torch's fused kernels where there are any.

    The fused kernels update all parameters in one call, and can leave them alone on the device's own decision, so
    that the check for NaN needs no waiting. Weight decay is for matrices and filters; biases and the scales of norms
    have none.

    Raises:
        UsageError: --optimizer muon, and the model has nothing for it.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "muon":
        hidden = hidden_matrices(model)
        matrices = _groups(settings, [parameter for parameter in trainable if id(parameter) in hidden])
        others = _groups(settings, [parameter for parameter in trainable if id(parameter) not in hidden])
        return MuonWithAdamW(matrices, others, settings.learning_rate)
    groups = _groups(settings, trainable)
    if settings.optimizer == "sgd":
        fused = not sharded  # the fused kernel of SGD takes no DTensor (torch 2.13)
        return torch.optim.SGD(groups, settings.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.learning_rate, fused=True)


def _groups(settings: TrainSettings, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    if settings.weight_decay == 0:  # a second group is a second call of the kernels, which a small network would notice
        return [{"params": parameters, "weight_decay": 0.0}] if parameters else []
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": settings.weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def capture_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """Return all tensors of an optimizer, live, and a plain-value description that refers to them.

    torch's own state-dict API is not used: before the first step it changes the optimizer, and it turns tuples into
    lists (torch 2.13).
    """
    names = parameter_names(model)
    tensors: Tensors = {}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        packed = {key: _pack(value, tensors, f"group/{number}/{key}") for key, value in settings.items()}
        groups.append({"params": [names[id(parameter)] for parameter in group["params"]], "settings": packed})
    states = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        states[name] = {key: _pack(value, tensors, f"{name}/{key}") for key, value in values.items()}
    return tensors, {"kind": type(optimizer).__name__, "groups": groups, "states": states}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    record: dict[str, Any],
    changed: Sequence[str] = (),
) -> None:
    """Put an optimizer into the captured state. Values keep their dtype, which load_state_dict would cast.

    Settings of its groups that are named in `changed` stay as they are, and so does the choice of kernels. Parameters
    may be grouped otherwise than they were: without weight decay all are in one group.

    Raises:
        ValueError: the checkpoint is of another kind of optimizer or other parameters, or a group here would need two
            values of one setting; nothing was changed.
    """
    names = parameter_names(model)
    kind = type(optimizer).__name__
    if record["kind"] != kind:
        raise ValueError(f"the checkpoint holds an optimizer {record['kind']}, this run uses {kind}")
    kept = (*changed, *_KERNELS)
    saved: dict[str, dict[str, Any]] = {}
    for group in record["groups"]:
        settings = {key: value for key, value in group["settings"].items() if key not in kept}
        saved |= dict.fromkeys(group["params"], settings)
    here = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    several = [group for group in here if any(saved.get(name) != saved.get(group[0]) for name in group)]
    if several or {name for group in here for name in group} != saved.keys():
        raise ValueError(
            "the optimizer of the checkpoint has other parameters, or other settings for some of them, than the one of "
            "this run. Its weights can be the start of another run: --init_from, with another --run_name"
        )
    by_name: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            by_name[names[id(parameter)]] = (parameter, group)
        settings = saved[names[id(group["params"][0])]]
        group.update({key: _unpack(value, tensors, None, False) for key, value in settings.items()})
    optimizer.state.clear()
    for name, values in record["states"].items():
        parameter, group = by_name[name]
        on_device = bool(group.get("capturable") or group.get("fused"))
        optimizer.state[parameter] = {
            key: _unpack(value, tensors, parameter, on_device or key not in COUNTERS) for key, value in values.items()
        }


def _pack(value: Any, tensors: Tensors, name: str) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, tensors, f"{name}/{number}") for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, tensors, f"{name}/{key}") for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"the optimizer keeps {name!r} of type {type(value).__name__}; a checkpoint cannot hold it")


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor], parameter: torch.Tensor | None, on_device: bool) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        tensor = tensors[content]
        if parameter is None or (tensor.ndim == 0 and not on_device):
            return tensor.clone()
        if tensor.shape != parameter.shape:
            return tensor.to(parameter.device, copy=True)
        # As the parameter lies in memory (channels_last, say): fused kernels walk both in that order.
        value = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
        copy_into(value, tensor)
        return value
    if kind == "dict":
        return {key: _unpack(item, tensors, parameter, on_device) for key, item in content.items()}
    items = [_unpack(item, tensors, parameter, on_device) for item in content]
    return tuple(items) if kind == "tuple" else items
