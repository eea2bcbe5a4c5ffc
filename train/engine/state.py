"""What a run is at a step: the one list of what a checkpoint holds, and its exact image on the CPU.

Model and optimizer are keyed by clean parameter names and held in full, so that plain, DDP, FSDP2 and compiled models
write the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from train.engine.randomness import capture_rng, restore_rng
from train.engine.runtime import Runtime
from train.engine.schedule import EarlyStopping, Plateau

Tensors = dict[str, torch.Tensor]
Parts = Mapping[str, Mapping[str, torch.Tensor]]  # the files of a checkpoint
Value = TypeVar("Value")

# Numbers that torch.optim keeps on the CPU unless the optimizer is fused or capturable (torch 2.13).
_COUNTERS = ("step", "mu_product")
# Settings that say how a step is computed, not which; FSDP2, say, does not have all of them.
_KERNELS = ("foreach", "fused", "capturable", "differentiable")


@dataclass
class Progress:
    """Where a run is, in plain values."""

    slots: int  # parts of a batch with randomness of their own; fixed at the first start
    step: int = 0  # global batches used, whether or not the update was skipped
    epoch: int = 0  # finished passes over the training split
    sample: int = 0  # samples of the current epoch that were used
    samples_seen: int = 0
    skipped_steps: int = 0  # not applied because of NaN or infinity
    skipped_in_a_row: int = 0
    best_value: float | None = None
    best_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the latest evaluation
    metrics_step: int | None = None  # step of the latest evaluation
    metrics_bytes: int = 0  # length of metrics.jsonl
    train_seconds: float = 0.0
    finished: bool = False
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    plateau: Plateau = field(default_factory=Plateau)


def progress_from_json(values: dict[str, Any]) -> Progress:
    """Rebuild what `asdict` made of a Progress.

    Raises:
        ValueError: a name is unknown or missing: the checkpoint is of another version.
    """
    values = dict(values)
    for name, kind in (("early_stopping", EarlyStopping), ("plateau", Plateau)):
        if name in values:
            values[name] = _rebuild(kind, values[name])
    return _rebuild(Progress, values)


def _rebuild(kind: type[Value], values: dict[str, Any]) -> Value:
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    if values.keys() != names:
        raise ValueError(f"{kind.__name__} holds {sorted(values.keys() ^ names)} too much or too little")
    return kind(**values)


@dataclass
class RunState:
    """Everything a run is at a step boundary."""

    model: nn.Module  # as wrapped for training
    optimizer: torch.optim.Optimizer
    progress: Progress
    scaler: Any = None  # torch.amp.GradScaler with fp16
    ema: Tensors | None = None  # running average of the weights, by clean name
    window: torch.Tensor | None = None  # sums of the training metrics since the last log line, of this process


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
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


def assign(model: nn.Module, live: Tensors, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values, whole or sharded, into the live tensors of a model.

    FSDP2 keeps the root's parameters whole after a forward pass without backward (torch 2.13), and would go on with
    those instead of what the shards become.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, target in live.items():
        copy_into(target, values[name])


def _like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor as `target` is. Each process holds the full one, so nothing is sent."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor) and value.shape == target.shape:
        value = value.to(target.device)
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value


# ---- optimizer -------------------------------------------------------------------------------------------------------


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the clean name of each parameter by its id; tied parameters have the first of their names.

    Taken from the state dict: it alone makes FSDP2 put the shards back in place of what a forward pass left whole.
    """
    return {id(value): name for name, value in named_tensors(model)[0].items()}


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

    Settings of its groups that are named in `changed` stay as they are, and so does the choice of kernels.

    Raises:
        ValueError: the checkpoint is of another kind of optimizer or other parameters; nothing was changed.
    """
    names = parameter_names(model)
    kind = type(optimizer).__name__
    if record["kind"] != kind:
        raise ValueError(f"the checkpoint holds an optimizer {record['kind']}, this run uses {kind}")
    here = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if here != [group["params"] for group in record["groups"]]:
        raise ValueError("the optimizer of the checkpoint has other parameters than the one of this run")
    by_name: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
    for group, saved in zip(optimizer.param_groups, record["groups"]):
        for parameter in group["params"]:
            by_name[names[id(parameter)]] = (parameter, group)
        settings = {key: _unpack(value, tensors, None, False) for key, value in saved["settings"].items()}
        group.update({key: value for key, value in settings.items() if key not in (*changed, *_KERNELS)})
    optimizer.state.clear()
    for name, values in record["states"].items():
        parameter, group = by_name[name]
        on_device = bool(group.get("capturable") or group.get("fused"))
        optimizer.state[parameter] = {
            key: _unpack(value, tensors, parameter, on_device or key not in _COUNTERS) for key, value in values.items()
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


# ---- the whole -------------------------------------------------------------------------------------------------------


def capture(state: RunState, runtime: Runtime) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the live tensors of each file of a checkpoint and the plain values of state.json.

    All processes must call it; what is small (generators, windows) is gathered from all of them.
    """
    model_tensors, aliases = named_tensors(state.model)
    optimizer_tensors, optimizer_record = capture_optimizer(state.optimizer, state.model)
    files = {"model": model_tensors, "optimizer": optimizer_tensors}
    if state.ema is not None:
        files["ema"] = state.ema
    files["rng"] = {
        f"process_{rank:05d}/{name}": value
        for name, mine in capture_rng(runtime.device).items()
        for rank, value in enumerate(runtime.gather(mine))
    }
    if state.window is not None:
        windows = runtime.gather(state.window.detach().cpu())
        files["rng"] |= {f"process_{rank:05d}/window": window for rank, window in enumerate(windows)}
    record = {
        "progress": asdict(state.progress),
        "optimizer": optimizer_record,
        "aliases": aliases,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
    }
    return files, record


def restore(
    state: RunState, runtime: Runtime, files: Parts, record: dict[str, Any], changed: Sequence[str] = ()
) -> None:
    """Put a run into the captured state, whatever the number of processes then and now.

    Settings of the optimizer that are named in `changed` stay as they are; an average of the weights that the
    checkpoint lacks starts from the weights.

    Raises:
        ValueError: the checkpoint does not fit the model or the optimizer; says where. The run must not go on.
    """
    restore_model(state.model, files["model"], record["aliases"])
    restore_optimizer(state.optimizer, state.model, files["optimizer"], record["optimizer"], changed)
    if state.ema is not None:
        for name, tensor in state.ema.items():
            copy_into(tensor, files.get("ema", files["model"])[name])
    state.progress = progress_from_json(record["progress"])
    if state.scaler is not None and record["scaler"] is not None:
        state.scaler.load_state_dict(record["scaler"])
    processes = sorted({name.split("/")[0] for name in files["rng"]})
    mine = f"process_{runtime.rank:05d}"
    if len(processes) == runtime.num_processes:
        states = {name.split("/")[1]: value for name, value in files["rng"].items() if name.startswith(mine)}
        restore_rng(states, runtime.device)
        window = states.get("window")
    else:  # other processes than before: their sums go to rank 0
        windows = [value for name, value in files["rng"].items() if name.endswith("/window")]
        window = torch.stack(windows).sum(dim=0) if windows else None
        if window is not None and runtime.rank > 0:
            window = torch.zeros_like(window)
    state.window = None if window is None else window.to(runtime.device)


def restore_model(model: nn.Module, saved: Mapping[str, torch.Tensor], saved_aliases: dict[str, str]) -> None:
    """Copy saved weights into a model.

    Raises:
        ValueError: names or shapes differ; lists them. The model is unchanged.
    """
    live, aliases = named_tensors(model)
    problems = [f"missing {name}" for name in sorted(live.keys() - saved.keys())]
    problems += [f"unknown {name}" for name in sorted(saved.keys() - live.keys())]
    problems += [
        f"{name} is {tuple(saved[name].shape)}, the model wants {tuple(live[name].shape)}"
        for name in sorted(live.keys() & saved.keys())
        if saved[name].shape != live[name].shape
    ]
    if aliases != saved_aliases:
        problems.append("other tensors are tied")
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems[:10]))
    assign(model, live, saved)
