"""Which checkpoint a start goes on from, and whether its settings are those of the run."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.engine import checkpoint
from train.engine.checkpoint import Checkpoint, DamagedCheckpointError
from train.engine.errors import UsageError, see
from train.engine.initial import Origin, find_origin
from train.engine.run_directory import RunDirectory
from train.engine.runtime import Runtime
from train.engine.settings import RunSettings

_PARTS = ("model", "optimizer", "freeze")  # of which other ones have other tensors


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return what a checkpoint says of where it was made."""
    return {
        "num_processes": runtime.num_processes,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else runtime.device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def choose_checkpoint(settings: RunSettings, run: RunDirectory) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that --resume names, if there is one, and what is wrong with newer ones.

    Raises:
        UsageError: --resume names what is not there, is damaged, or may not be.
    """
    folder, wish = run.checkpoints, settings.resume
    if wish == "never":
        if checkpoint.list_steps(folder):
            raise UsageError(f"--resume never: {run.path} has checkpoints already; choose another --run_name")
        return None, []
    if wish in ("auto", "latest", "best"):
        found, damages = checkpoint.find_best(folder) if wish == "best" else checkpoint.find_newest(folder)
        messages = [f"skipped a checkpoint: {damage}; {see('a-run-does-not-resume')}" for damage in damages]
        if found is None and wish != "auto":
            raise UsageError([*messages, f"--resume {wish}: {run.path} has no valid checkpoint"])
        return found, messages
    path = Path(wish)
    if not path.exists():
        raise UsageError(f"--resume {wish}: neither auto, never, latest, best nor a checkpoint's folder")
    try:
        return checkpoint.open_checkpoint(path), []
    except DamagedCheckpointError as error:
        raise UsageError(f"--resume: {error}") from error


def describe_architecture(model: nn.Module) -> dict[str, Any] | None:
    """Return the configuration that a model of Transformers carries, in plain values; None: settings say it all."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("transformers_version", None)
    return values


def compare_settings(
    settings: RunSettings,
    runtime: Runtime,
    data: dict[str, Any],
    architecture: dict[str, Any] | None,
    found: Checkpoint,
) -> list[str]:
    """Return notes on harmless differences between the checkpoint's settings and the new ones.

    Raises:
        UsageError: a setting that changes the result differs and the user has not agreed.
    """
    saved = found.record
    new = {
        **dataclasses.asdict(settings),
        "data": data["fingerprint"],
        "precision": runtime.accelerator.mixed_precision,
    }
    # A setting that is newer than the checkpoint had its default.
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    old = {**defaults, **saved["config"], "data": saved["data"]["fingerprint"], "precision": saved["precision"]}
    there, here = saved.get("architecture") or {}, architecture or {}
    others = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    old["architecture"], new["architecture"] = ({name: part.get(name) for name in others} for part in (there, here))
    hidden = {
        "config", "resume", "allow_changes", "run_name", "output_dir", "dry_run", "preflight", "dataset",
        "mixed_precision", "init_from",
    }  # fmt: skip
    notes, refused = [], []
    for name in sorted((old.keys() | new.keys()) - hidden):
        before, now = _plain(old.get(name)), _plain(new.get(name))
        if before == now:
            continue
        line = f"{name}: {before} in the checkpoint, {now} now"
        if name in settings.neutral or name in settings.allow_changes:
            notes.append(f"changed {line}")
        else:
            refused.append((name, line))
    if refused:
        names = " ".join(name for name, _ in refused)
        lines = "\n  ".join(line for _, line in refused)
        advice = f"To go on all the same: --allow_changes {names}. To start anew: choose another --run_name"
        if parts := [name for name, _ in refused if name in _PARTS]:
            advice = (
                f"The {' and '.join(parts)} cannot be another one within a run. To start anew: choose another "
                f"--run_name; with --init_from {found.path} it begins with these weights, as far as they fit"
            )
        raise UsageError(
            f"{found.path} was made with other settings, which change the result:\n  {lines}\n{advice}; "
            f"{see('a-run-does-not-resume')}"
        )
    before, now = saved["environment"], environment(runtime)
    for name in ("num_threads", "device", "torch"):
        if before[name] != now[name]:
            notes.append(f"changed {name}: {before[name]} in the checkpoint, {now[name]} now; the last bits may differ")
    return notes


def choose_origin(settings: RunSettings, found: Checkpoint | None) -> Origin | None:
    """Return what the run began with, or begins with; a checkpoint remembers it, and the file may be gone.

    Raises:
        UsageError: a fresh run cannot begin with it; or the run began with other weights, and the user has not agreed.
    """
    if found is None:
        return None if settings.origin is None else find_origin(settings.origin)
    record = found.record.get("origin")
    saved = None if record is None else Origin(Path(record["path"]), record["part"], record["digest"])
    if "init_from" in settings.allow_changes:
        return saved
    try:
        now = None if settings.origin is None else find_origin(settings.origin)
    except UsageError:
        if saved is None:
            raise
        now = saved
    if (now and now.digest) != (saved and saved.digest):
        began = "random ones" if saved is None else f"those of {saved.path}"
        asked = "there is no --init_from" if settings.origin is None else f"--init_from {settings.origin} holds others"
        raise UsageError(
            f"{found.path} is of a run that began with other weights: {began}, and now {asked}. To go on all the same, "
            "with the weights of the checkpoint: --allow_changes init_from. To start anew: choose another --run_name"
        )
    return saved


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
