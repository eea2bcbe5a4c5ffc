"""What a start of a run ran on and from: kept in run.json, a record for each start."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import torch

from train.engine.runtime import Runtime

ROOT = Path(__file__).parents[2]
SCHEDULER = (
    "SLURM_JOB_",
    "SLURM_ARRAY_",
    "SLURM_RESTART_COUNT",
    "SLURM_NNODES",
    "SLURM_SUBMIT_",
    "JOB_COMPLETION_INDEX",
)
GIT_SECONDS = 10  # a network file system may be slow, and the run does not need git


def record_start(runtime: Runtime, step: int) -> dict[str, Any]:
    """Return, in plain values, what this start is: time, command, code, versions, machine and scheduler.

    Args:
        runtime: of this start.
        step: the optimizer step that it goes on from; 0 for a fresh run.
    """
    device = runtime.device
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "commit": find_commit(ROOT),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
        "host": socket.gethostname(),
        "processes": runtime.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "scheduler": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SCHEDULER)},
    }


def find_commit(folder: Path) -> str | None:
    """Return the commit of a work tree, with "+changes" where files differ from it; None where git knows of none."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
