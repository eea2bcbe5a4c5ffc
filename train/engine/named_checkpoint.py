"""The checkpoint that a person names: a step, best, latest or a path."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from train.engine import checkpoint
from train.engine.checkpoint import Checkpoint
from train.engine.errors import UsageError


def find_folder(run: str) -> Path:
    """Return the folder that holds the checkpoints of a run.

    Raises:
        UsageError: there is none.
    """
    path = Path(run)
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (folder.name == "checkpoints" or any(folder.glob("step_*"))):
            return folder
    reason = "holds no checkpoints" if path.is_dir() else "is no folder"
    raise UsageError(f"{run}: {reason}; give the folder of a run, such as runs/NAME")


def find_checkpoint(folder: Path, wish: str) -> Checkpoint:
    """Return a verified checkpoint: a step, best, latest, or the path of one.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if wish in ("best", "latest"):
        found, damages = checkpoint.find_best(folder) if wish == "best" else checkpoint.find_newest(folder)
        for damage in damages if found else []:
            print(f"skipped a checkpoint: {damage}", file=sys.stderr)
        if found is None:
            raise UsageError(damages or f"{folder}: holds no checkpoints")
        return found
    path = folder / checkpoint.step_name(int(wish)) if re.fullmatch("[0-9]{1,18}", wish) else Path(wish)
    if not os.path.isdir(path):  # unlike Path.is_dir it takes any text
        steps = ", ".join(map(str, checkpoint.list_steps(folder))) or "none"
        raise UsageError(f"{wish}: neither best, latest, a step of the run ({steps}) nor the folder of a checkpoint")
    try:
        return checkpoint.open_checkpoint(path.absolute())  # absolute: a checkpoint's name counts, also for "."
    except checkpoint.DamagedCheckpointError as error:
        raise UsageError(str(error)) from error
