"""metrics.jsonl always, W&B and TensorBoard beside it. Tracking never stops a run and never waits for a person."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker

from train.engine.run_directory import RunDirectory
from train.engine.settings import RunSettings
from train.engine.wandb_tracker import WandbTracker


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
        self.others: list[GeneralTracker] = []  # beside metrics.jsonl, as far as they work
        self._file: IO[bytes] | None = None
        if run is None:
            return
        self._run = run
        path = run.metrics
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if self._file.tell() < keep_bytes:
            print(f"{path} is shorter than when the checkpoint was made; older lines are missing", file=sys.stderr)
        else:
            self._file.truncate(keep_bytes)
        self.position = self._file.seek(0, os.SEEK_END)

    def start(self, run: RunDirectory, settings: RunSettings, record: dict[str, Any]) -> None:
        """Start the trackers that the settings name beside metrics.jsonl.

        Args:
            run: the run.
            settings: the run's.
            record: of this start, as run.json has it.
        """
        lines = merge_steps(read_metrics(run.metrics))
        if "wandb" in settings.tracker:
            tracker = WandbTracker(run, settings, record)
            self.others.append(tracker)
            self._each(lambda one: one.start(), tracker)
            for step, values in lines.items():  # what W&B lacks, because an earlier start was killed or had no network
                self._each(lambda one: one.log(values, step), tracker)  # noqa: B023
        if "tensorboard" in settings.tracker:
            # Of the files of earlier starts, TensorBoard then shows only what is before this one.
            tracker = TensorBoardTracker("tensorboard", run.path, purge_step=max(lines, default=-1) + 1)
            self.others.append(tracker)
            self._each(lambda one: one.start(), tracker)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line; call it once for each step at most."""
        if self._file is None:
            return
        self._write(step, values)
        self._each(lambda one: one.log(values, step))

    def summarize(self, step: int, values: dict[str, float]) -> None:
        """Write the results of a finished run: a last line, and W&B's summary."""
        if self._file is None:
            return
        self._write(step, values)
        self._each(lambda one: one.summarize(values) if isinstance(one, WandbTracker) else one.log(values, step))

    def show(self, checkpoints: dict[str, Path]) -> None:
        """Send W&B the pictures of the run as they are at its end, and, where that is wanted, checkpoints by name."""
        self._each(lambda one: one.show(checkpoints) if isinstance(one, WandbTracker) else None)

    def close(self) -> None:
        """Close all places; W&B gets a bounded time to finish."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._each(lambda one: one.finish())
        self.others.clear()

    def _each(self, act: Callable[[GeneralTracker], None], only: GeneralTracker | None = None) -> None:
        """Let the other trackers act. One that fails in any way is switched off with one warning."""
        for tracker in list(self.others):
            try:
                if only in (None, tracker):
                    act(tracker)
            except Exception as error:  # tracking never stops a run: metrics.jsonl has the numbers
                self.others.remove(tracker)
                rest = "metrics.jsonl has all metrics"
                if isinstance(tracker, WandbTracker):
                    rest += f"; upload them later with: python launch/wandb_sync.py {self._run.path}"
                reason = " ".join(str(error).split())
                print(f"warning: {tracker.name} failed ({reason}); {rest}", file=sys.stderr, flush=True)

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


def merge_steps(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Return the metrics of each step, in the order of the steps."""
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        values = {name: value for name, value in line.items() if name not in ("step", "time")}
        steps.setdefault(line["step"], {}).update(values)
    return dict(sorted(steps.items()))
