"""A run is a directory: runs/NAME/{config.yaml, run.json, metrics.jsonl, checkpoints/, plots/}."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from train.engine import storage
from train.engine.errors import UsageError, see


@dataclass
class RunDirectory:
    """An open run. Only rank 0 writes into it."""

    path: Path
    identity: dict[str, Any] = field(default_factory=dict)  # run.json
    _lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def remember(self, **values: Any) -> None:
        """Add values to run.json, durably."""
        self.identity.update(values)
        storage.replace_file(self.path / "run.json", json.dumps(self.identity, indent=1) + "\n")

    def close(self) -> None:
        """Let another process open the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_run(path: Path) -> RunDirectory:
    """Create or open a run, lock it, and sweep what a killed process left behind.

    Raises:
        UsageError: the folder cannot be written, or another process uses the run.
    """
    run = RunDirectory(path)
    try:
        for folder in (path, run.checkpoints, run.plots):
            folder.mkdir(parents=True, exist_ok=True)
        run._lock = open(path / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--output_dir: cannot write to {path} ({error.strerror}); choose another folder") from error
    _lock(run)
    storage.sweep(run.checkpoints)
    file = path / "run.json"
    if file.exists():
        try:
            run.identity = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file}: is not valid JSON ({error}); restore it or choose another --run_name") from error
    else:
        run.remember(id=secrets.token_hex(4), created=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return run


def _lock(run: RunDirectory) -> None:
    """Take the lock of the run. The kernel releases it when the process ends, however it ends."""
    assert run._lock is not None
    try:
        fcntl.flock(run._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        run._lock.seek(0)
        holder = run._lock.read().strip() or "another process"
        raise UsageError(
            f"{run.path} is in use by {holder}; wait for it, stop it, or choose another --run_name; "
            f"{see('a-run-does-not-resume')}"
        ) from error
    run._lock.seek(0)
    run._lock.truncate()
    run._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    run._lock.flush()
