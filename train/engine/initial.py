"""--init_from: the weights that a fresh run starts from, out of a run, a checkpoint or a .safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from train.engine import checkpoint, storage
from train.engine.checkpoint import DamagedCheckpointError
from train.engine.errors import UsageError
from train.engine.runtime import Runtime
from train.engine.tensors import clean_name, copy_into, named_tensors

MOST_LINES = 20  # of tensors that do not fit


@dataclass(frozen=True)
class Origin:
    """Where weights come from."""

    path: Path  # a checkpoint's folder or a .safetensors file
    part: str  # of the checkpoint: model, or ema where the run that it is of judged by the averaged weights
    digest: str  # checksum of the file, or of the checkpoint's manifest, which has those of its files

    def load(self) -> dict[str, torch.Tensor]:
        """Return the tensors by clean name, on the CPU.

        Raises:
            UsageError: they cannot be read, or are no longer those that were found.
        """
        try:
            if self.path.is_dir():
                found: Mapping[str, torch.Tensor] = checkpoint.open_checkpoint(self.path).load()[self.part]
            else:
                found = load_file(self.path)
            same = _digest(self.path) == self.digest
        except (OSError, SafetensorError, DamagedCheckpointError) as error:
            raise UsageError(f"--init_from {self.path}: cannot be read ({error})") from error
        if not same:
            raise UsageError(f"--init_from {self.path}: is another file than rank 0 has; give all machines the same")
        return {clean_name(name): found[name] for name in found}


def find_origin(wish: str) -> Origin:
    """Return what --init_from names: of a run its best checkpoint, a checkpoint, or a .safetensors file.

    Raises:
        UsageError: it is neither, or damaged.
    """
    path = Path(wish)
    try:
        if path.is_file() and path.suffix == ".safetensors":
            return Origin(path, "model", _digest(path))
        if (path / "checkpoints").is_dir():
            found, damages = checkpoint.find_best(path / "checkpoints")
            if found is None:
                raise UsageError([*damages, f"--init_from {wish}: the run has no valid checkpoint"])
        elif (path / "manifest.json").exists():
            found = checkpoint.open_checkpoint(path)
        else:
            raise UsageError(f"--init_from {wish}: neither a run's folder, nor a checkpoint's, nor a .safetensors file")
    except (OSError, DamagedCheckpointError) as error:
        raise UsageError(f"--init_from {wish}: {error}") from error
    averaged = str(found.record["config"].get("best_metric")).startswith("val/ema_")
    return Origin(found.path, "ema" if averaged else "model", _digest(found.path))


def _digest(path: Path) -> str:
    return str(storage.checksum(path / "manifest.json" if path.is_dir() else path)["xxh3_128"])


def find_fitting(model: nn.Module, origin: Origin) -> dict[str, torch.Tensor]:
    """Return the saved tensors by clean name, of which at least one fits the model.

    Raises:
        UsageError: they cannot be read, or nothing in them fits.
    """
    saved, (live, _) = origin.load(), named_tensors(model)
    if not any(name in saved and _fits(live[name], saved[name]) for name in live):
        listed = "\n  ".join(_misfits(live, saved))
        raise UsageError(f"--init_from {origin.path}: none of its {len(saved)} tensors fits the model:\n  {listed}")
    return saved


def initialise(model: nn.Module, origin: Origin, runtime: Runtime) -> None:
    """Copy the weights whose names and shapes agree into a model, and list the others on rank 0.

    Raises:
        UsageError: on all processes: one of them cannot read the file, or nothing in it fits.
    """
    problem, saved = "", {}
    try:
        saved = find_fitting(model, origin)
    except UsageError as error:
        problem = str(error)
    if problems := [each for each in runtime.share(problem) if each]:
        raise UsageError(problems[0])
    live, _ = named_tensors(model)
    fitting = [name for name in live if name in saved and _fits(live[name], saved[name])]
    for name in fitting:
        copy_into(live[name], saved[name])
    averaged = " (averaged)" if origin.part == "ema" else ""
    runtime.say(f"weights of {origin.path}{averaged}: {len(fitting)} of the model's {len(live)} tensors taken")
    for line in _misfits(live, saved):
        runtime.say(f"  {line}")


def _fits(here: torch.Tensor, there: torch.Tensor) -> bool:
    return here.shape == there.shape and here.is_floating_point() == there.is_floating_point()


def _misfits(live: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> list[str]:
    lines = [
        f"{name}: {_describe(live[name])} here, {_describe(saved[name])} there"
        for name in live
        if name in saved and not _fits(live[name], saved[name])
    ]
    lines += [f"{name}: {_describe(live[name])} here, not there" for name in live if name not in saved]
    lines += [f"{name}: not here, {_describe(saved[name])} there" for name in saved if name not in live]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more"]
    return lines


def _describe(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape)) + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")
