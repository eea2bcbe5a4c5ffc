"""metrics.jsonl always, W&B beside it. Tracking never stops a run and never waits for a person."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from train.engine.run_directory import RunDirectory

INIT_TIMEOUT_SECONDS = 20
FINISH_TIMEOUT_SECONDS = 25


class Tracker:
    """Writes each line of metrics to all places. On other ranks than 0, and in a dry run, it does nothing."""

    def __init__(self, run: RunDirectory | None, keep_bytes: int = 0) -> None:
        """Open metrics.jsonl and drop what was written after the resumed checkpoint.

        Args:
            run: the run, or None for a tracker that does nothing.
            keep_bytes: length of metrics.jsonl at the checkpoint.
        """
        self.error: OSError | None = None  # why a line could not be written; no other is written after it
        self.position = 0  # length in bytes of the whole lines of metrics.jsonl
        self._file: IO[bytes] | None = None
        self._wandb: _Wandb | None = None
        if run is None:
            return
        path = run.metrics
        sent = max(run.identity.get("last_logged_step", -1), last_step(path))
        if sent >= 0:
            run.remember(last_logged_step=sent)
        self._sent = sent
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if self._file.tell() < keep_bytes:
            print(f"{path} is shorter than when the checkpoint was made; older lines are missing", file=sys.stderr)
        else:
            self._file.truncate(keep_bytes)
        self.position = self._file.seek(0, os.SEEK_END)

    def start_wandb(self, run: RunDirectory, project: str, config: dict[str, Any]) -> None:
        """Send metrics to W&B too, into the run that this directory has had from the start."""
        self._wandb = _Wandb(run, project, config, self._sent)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line; call it once for each step at most."""
        if self._file is None:
            return
        self._write(step, values)
        if self._wandb is not None:
            self._wandb.log(step, values)

    def summarize(self, step: int, values: dict[str, float]) -> None:
        """Write the results of a finished run: a last line, and W&B's summary."""
        if self._file is None:
            return
        self._write(step, values)
        if self._wandb is not None:
            self._wandb.summarize(values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        assert self._file is not None
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        try:
            rest = line
            while rest and self.error is None:  # unbuffered: a killed process loses nothing
                rest = rest[self._file.write(rest) :]
                self.position += len(line) if not rest else 0
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Close all places; W&B gets a bounded time to finish."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None


def last_step(path: Path) -> int:
    """Return the highest step in a metrics file, -1 if there is none; a torn last line does not count."""
    steps = [line["step"] for line in read_metrics(path)]
    return max(steps, default=-1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a torn last line, left by a killed process, is dropped."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class _Wandb:
    """One W&B run through all restarts. Any failure switches it off with one warning.

    Steps that were already sent are not sent again: online W&B drops them, offline it would shift them (0.31).
    """

    def __init__(self, run: RunDirectory, project: str, config: dict[str, Any], sent: int) -> None:
        self._sent = sent
        self._run: Any = None
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            if run.identity.get("wandb_id") is None:
                run.remember(wandb_id=run.identity["id"], wandb_project=project)
            self._run = wandb.init(
                project=run.identity["wandb_project"],
                id=run.identity["wandb_id"],
                name=run.path.name,
                dir=str(run.path),
                config=config,
                mode=mode,  # type: ignore[arg-type]
                resume="allow",
                settings=wandb.Settings(
                    silent=True, init_timeout=INIT_TIMEOUT_SECONDS, finish_timeout=FINISH_TIMEOUT_SECONDS
                ),
            )
            if mode == "offline":
                print(f"W&B: offline; upload later with: wandb sync {run.path}/wandb/offline-run-*")
        except Exception as error:
            self._give_up("cannot start", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._run is None or step <= self._sent:
            return
        try:
            self._run.log(values, step=step)
            self._sent = step
        except Exception as error:
            self._give_up("failed", error)

    def summarize(self, values: dict[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.summary.update(values)
        except Exception as error:
            self._give_up("failed", error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up("cannot finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        # Tracking never stops a run: whatever W&B raises, metrics.jsonl has the numbers.
        self._run = None
        print(f"warning: W&B {what} ({error}); the run goes on, metrics are in metrics.jsonl", file=sys.stderr)
