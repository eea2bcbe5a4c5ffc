"""Writing checkpoints in the background; training stands still for the copy to host memory only."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.engine import checkpoint, storage
from train.engine.errors import TrainingError, see
from train.engine.tensors import Tensors


class CheckpointWriter:
    """Writes checkpoints on rank 0 in the background; training stands still for the copy to host memory only.

    At most one is in flight. An error of the writing thread is raised by `check` or `wait`, once.
    """

    def __init__(self, folder: Path, keep: int, shards: dist.ProcessGroup | None = None) -> None:
        """Prepare for writing.

        Args:
            folder: where checkpoints go.
            keep: newest ones to keep; the best is kept besides.
            shards: group of all processes, for sharded checkpoints. Each process then has a writer, which writes the
                files it is given; rank 0 adds state.json and the manifest. Nobody else may use the group.
        """
        self.folder = folder
        self.keep = keep
        self._shards = shards
        self.seconds = 0.0  # from the start of the latest save until it could be resumed from
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._announced = False

    def reserve(self, files: dict[str, Tensors]) -> None:
        """Make host memory ready in the background, for the first save to be as short as the later ones.

        Fresh memory is handed out by the kernel page by page as it is written to, several times slower than a copy.
        """
        shapes = {
            (file, name): (tensor.shape, tensor.dtype, tensor.device.type)
            for file, tensors in files.items()
            for name, tensor in tensors.items()
        }

        def touch() -> None:
            for key, (shape, dtype, device) in shapes.items():
                self._buffers[key] = _host_buffer(shape, dtype, device).zero_()

        self.wait()
        self._thread = threading.Thread(target=touch, name="checkpoint-memory", daemon=True)
        self._thread.start()

    def save(self, files: dict[str, Tensors], record: dict[str, Any], also_flush: list[Path]) -> None:
        """Copy the state and return; a thread writes it. If the one before failed, nothing is written.

        Raising here would end rank 0 alone, in the midst of a step of the others; `check` and `wait` raise.

        Args:
            files: full tensors of each file, on any device.
            record: plain values for state.json, among them record["progress"].
            also_flush: files that must be on the disk before the checkpoint exists.
        """
        start = time.perf_counter()
        self._join()
        if self.failed:
            return
        snapshot = {
            file: {name: self._copy(file, name, tensor) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the copies from the device are asynchronous
        # Turned into text here: the caller's values change as training goes on.
        text = json.dumps(record, indent=1)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, text, record["progress"], also_flush, start), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint in flight is on the disk.

        Raises:
            TrainingError: it could not be written; the ones before are intact.
        """
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Say whether an error waits to be raised."""
        return self._error is not None

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting.

        Raises:
            TrainingError: a checkpoint could not be written; the ones before are intact.
        """
        if self._error is not None:
            error, self._error = self._error, None
            steps = checkpoint.list_steps(self.folder)
            rest = f"the newest one is {checkpoint.step_name(steps[-1])}" if steps else "there is none yet"
            raise TrainingError(
                f"cannot write a checkpoint to {self.folder}: {error}. Checkpoints already there are intact; {rest}. "
                "Make room or mend the disk and run the same command again; "
                f"{see('the-disk-is-full')}"
            ) from error

    def _copy(self, file: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[file, name] = _host_buffer(tensor.shape, tensor.dtype, tensor.device.type)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _write(
        self, files: dict[str, Tensors], text: str, progress: dict[str, Any], also_flush: list[Path], start: float
    ) -> None:
        leads = self._shards is None or dist.get_rank() == 0
        self._announced = False
        try:
            if leads:
                for path in also_flush:
                    storage.sync(path)
                step = progress["step"]
                storage.commit_directory(
                    self.folder / checkpoint.step_name(step), lambda path: self._fill(path, files, text, step)
                )
            else:
                self._write_together(None, files)
            self.seconds = time.perf_counter() - start
            if leads:
                self._prune(progress["best_step"])
        except Exception as error:  # handed to the training thread, which raises it
            self._error = error
            if leads and self._shards is not None and not self._announced:
                self._write_together(None, {})  # the others wait for the name of a directory

    def _fill(self, path: Path, files: dict[str, Tensors], text: str, step: int) -> None:
        """Write all files of a checkpoint into its temporary directory; with shards, together with the others."""
        with storage.Flusher() as flusher:
            if self._shards is None:
                entries = _write_tensors(path, files, flusher)
            else:
                entries = self._write_together(path, files)
            entries["state.json"] = storage.write_file(path / "state.json", [text.encode()])
            flusher.add(path / "state.json")
            content = {"format": checkpoint.FORMAT, "step": step, "files": entries}
            manifest = json.dumps({**content, "digest": checkpoint.digest(content)}, indent=1)
            storage.write_file(path / "manifest.json", [manifest.encode()])

    def _write_together(self, path: Path | None, files: dict[str, Tensors]) -> dict[str, Any]:
        """Write this process's files into the directory that rank 0 names; return the entries of all files.

        Raises:
            OSError: on every process, if one of them could not write.
        """
        box = [path]
        dist.broadcast_object_list(box, src=0, group=self._shards)
        self._announced = True
        if box[0] is None:  # rank 0 has failed before, and says so itself
            return {}
        mine: dict[str, Any] | OSError
        try:
            with storage.Flusher() as flusher:  # rank 0 may be on another machine and cannot do it
                mine = _write_tensors(box[0], files, flusher)
        except OSError as error:
            mine = error
        everyone: list[Any] = [None] * dist.get_world_size(self._shards)
        dist.all_gather_object(everyone, mine, group=self._shards)
        failed = [part for part in everyone if isinstance(part, OSError)]
        if failed:
            raise failed[0]
        return {name: entry for part in everyone for name, entry in part.items()}

    def _prune(self, best_step: int | None) -> None:
        for step in checkpoint.list_steps(self.folder)[: -self.keep]:
            if step != best_step:
                storage.remove_directory(self.folder / checkpoint.step_name(step))


def _host_buffer(shape: torch.Size, dtype: torch.dtype, device_type: str) -> torch.Tensor:
    # From pinned memory a GPU copies by itself.
    return torch.empty(shape, dtype=dtype, pin_memory=device_type == "cuda")


def _write_tensors(path: Path, files: dict[str, Tensors], flusher: storage.Flusher) -> dict[str, Any]:
    entries = {}
    for part, tensors in files.items():
        file = path / f"{part}.safetensors"
        entries[file.name] = storage.write_file(file, storage.tensor_chunks(tensors))
        flusher.add(file)
    return entries
