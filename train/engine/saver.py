"""Saving a run at a step: what goes into a checkpoint, which process writes what, and what it costs."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from train.engine.errors import TrainingError, see
from train.engine.preemption import Preemption, Request
from train.engine.resume import environment
from train.engine.runtime import Runtime
from train.engine.session import Session
from train.engine.settings import RunSettings, parse_every
from train.engine.sharded import describe_whole, own_pieces, shard_file
from train.engine.state import RunState, capture
from train.engine.tensors import Tensors, full
from train.engine.tracking import Tracker
from train.engine.writer import CheckpointWriter


class Saver:
    """Saves the state of a run. All processes call its methods together; a dry run saves nothing."""

    def __init__(
        self,
        settings: RunSettings,
        runtime: Runtime,
        session: Session,
        state: RunState,
        tracker: Tracker,
        data: dict[str, Any],
    ) -> None:
        self._runtime = runtime
        self._run = session.run
        self.state = state
        self._tracker = tracker
        self._every = parse_every(settings.checkpoint_every)
        self._sharded = settings.sharded and runtime.num_processes > 1
        self._writer = None  # on rank 0 only, unless the checkpoint is sharded
        if self._run is not None and (runtime.is_main or self._sharded):
            group = dist.new_group(backend="gloo") if self._sharded else None  # its own: a thread uses it
            self._writer = CheckpointWriter(self._run.checkpoints, settings.keep_checkpoints, group)
        self._record = {  # every checkpoint carries it beside the state
            "config": asdict(settings),
            "precision": runtime.accelerator.mixed_precision,
            "data": data,
            "environment": environment(runtime),
            "origin": None if session.origin is None else {**asdict(session.origin), "path": str(session.origin.path)},
            "architecture": session.architecture,
        }
        self._last_save = time.perf_counter()
        self._blocked_seconds = 0.0  # how long training stood still for the latest save

    def reserve(self) -> None:
        """Get memory for checkpoints; to be called when the first step has made the optimizer's state."""
        if self._run is not None:
            files = self._files(capture(self.state, self._runtime)[0])
            if self._writer is not None:
                self._writer.reserve(files)

    def save(self) -> None:
        """Save the state at this step; returns when it is copied, a thread writes it.

        Raises:
            TrainingError: the checkpoint before could not be written.
        """
        start = self._last_save = time.perf_counter()
        if self._run is None:
            return
        self.state.progress.metrics_bytes = self._tracker.position
        live, record = capture(self.state, self._runtime)
        files = self._files(live)
        if self._sharded:
            record["whole"] = {part: describe_whole(tensors) for part, tensors in live.items() if part != "rng"}
        # Lines that could not be written would be missing for ever; the run is about to end with that error.
        whole = self._tracker.error is None or self._sharded
        if self._writer is not None and whole:
            self._writer.save(files, self._record | record, also_flush=[self._run.metrics])
        self._blocked_seconds = time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the checkpoint in flight is on the disk.

        Raises:
            TrainingError: it, or a line of metrics, could not be written.
        """
        if self._writer is not None:
            self._writer.wait()
        if self._tracker.error is not None:
            assert self._run is not None
            raise TrainingError(
                f"cannot write to {self._run.metrics}: {self._tracker.error.strerror}. Checkpoints already there are "
                "intact. Make room or mend the disk and run the same command again; "
                f"{see('the-disk-is-full')}"
            )

    def watch(self, preemption: Preemption) -> None:
        """Surface an error of the writing thread or of the metrics, and ask for saves by the minute.

        Raises:
            TrainingError: a checkpoint could not be written. With several processes they are asked to leave instead.
        """
        if self._writer is None:
            return
        if self._writer.failed or self._tracker.error is not None:
            if self._runtime.num_processes == 1:
                self.wait()
            preemption.wish = Request.ABORT  # all processes leave together, at the next step
            return
        minutes = (time.perf_counter() - self._last_save) / 60
        if self._every.unit == "minutes" and minutes > self._every.count and preemption.wish is Request.NOTHING:
            preemption.wish = Request.SAVE

    def values(self) -> dict[str, float]:
        """Return the seconds of the latest save, for the metrics."""
        if self._writer is None or self._writer.seconds == 0:
            return {}
        return {
            "perf/checkpoint_seconds": self._writer.seconds,
            "perf/checkpoint_blocked_seconds": self._blocked_seconds,
        }

    def _files(self, live: dict[str, Tensors]) -> dict[str, Tensors]:
        """Return what this process writes of the live tensors, by file."""
        if not self._sharded:
            return {part: {name: full(tensor) for name, tensor in tensors.items()} for part, tensors in live.items()}
        rank, num_processes = self._runtime.rank, self._runtime.num_processes
        files: dict[str, Tensors] = {
            shard_file(part, rank, num_processes): own_pieces(tensors, rank, num_processes)
            for part, tensors in live.items()
            if part != "rng"
        }
        return files | ({"rng": live["rng"]} if rank == 0 else {})
