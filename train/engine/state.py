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

from train.engine.deepspeed import Zero
from train.engine.optimizer import capture_optimizer, restore_optimizer
from train.engine.randomness import capture_rng, restore_rng
from train.engine.runtime import Runtime
from train.engine.schedule import EarlyStopping, Plateau
from train.engine.tensors import Parts, Tensors, assign, copy_into, named_tensors

Value = TypeVar("Value")


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
    stream: dict[str, Any] | None = None  # where in a stream the current block of samples begins
    unlogged: dict[str, float] | None = None  # training metrics of this step, if its evaluation was interrupted
    finished: bool = False
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    plateau: Plateau = field(default_factory=Plateau)


def progress_from_json(values: dict[str, Any]) -> Progress:
    """Rebuild what `asdict` made of a Progress.

    Raises:
        ValueError: a name is unknown or missing: the checkpoint is of another version.
    """
    values = {"unlogged": None, **values}  # checkpoints made before 22 November 2026 lack it
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
    zero: Zero | None = None  # with DeepSpeed
    ema: Tensors | None = None  # running average of the weights, by clean name
    window: torch.Tensor | None = None  # sums since the last log line, of this process: see step_sums.py
    carried: Tensors | None = None  # what else passes from one step to the next, such as the state of an LSTM


def capture(state: RunState, runtime: Runtime) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the live tensors of each file of a checkpoint and the plain values of state.json.

    All processes must call it; what is small (generators, windows) is gathered from all of them.
    """
    model_tensors, aliases = named_tensors(state.model)
    if state.zero is not None:
        state.zero.gather()
    optimizer_tensors, optimizer_record = capture_optimizer(state.optimizer, state.model)
    if state.zero is not None:
        state.optimizer.state.clear()
    files = {"model": model_tensors, "optimizer": optimizer_tensors}
    if state.ema is not None:
        files["ema"] = state.ema
    if state.carried is not None:
        files["carried"] = state.carried
    files["rng"] = {
        f"process_{rank:05d}/{name}": value
        for name, mine in capture_rng(runtime.device).items()
        for rank, value in enumerate(runtime.gather(mine))
    }
    if state.window is not None:
        windows = runtime.gather(state.window)
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
    if state.zero is not None:
        state.zero.scatter()
    if state.ema is not None:
        for name, tensor in state.ema.items():
            copy_into(tensor, files.get("ema", files["model"])[name])
    if "carried" in files:
        state.carried = {name: value.to(runtime.device) for name, value in files["carried"].items()}
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
    state.window = window


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
