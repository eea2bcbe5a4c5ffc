"""Save, find, verify, load and prune checkpoints: safetensors and JSON, no pickle, never half there.

A checkpoint is a directory `step_00001200` with model, optimizer, rng (and ema) .safetensors, state.json, and
manifest.json, which was written last and holds size and checksum of each file. Without a valid manifest it does not
exist. Checksums catch accidents, not attackers; against those, nothing here can run code.
"""

from __future__ import annotations

import json
import re
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from train.engine import storage
from train.engine.errors import TrainingError
from train.engine.sharded import SHARD, ShardedTensors, complete
from train.engine.state import Tensors

FORMAT = 1
REQUIRED = ("model", "optimizer")  # each one file, or a shard of each process
KNOWN = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "rng.safetensors", "state.json")
_NAME = re.compile(r"step_[0-9]{8,18}")
_LARGEST_JSON = 256 * 2**20


class DamagedCheckpointError(ValueError):
    """A checkpoint that must not be used: says which file and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    record: dict[str, Any]
    files: tuple[str, ...]  # names of the tensor files that the manifest vouches for

    def load(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return the tensors of each part on the CPU."""
        parts: dict[str, Mapping[str, torch.Tensor]] = {}
        shards: dict[str, list[Path]] = {}
        for name in self.files:
            if match := SHARD.fullmatch(name):
                shards.setdefault(match[1], []).append(self.path / name)
            else:
                parts[name.removesuffix(".safetensors")] = load_file(self.path / name)
        return parts | {part: ShardedTensors(files, self.record["whole"][part]) for part, files in shards.items()}


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint of a step; names sort as steps do."""
    return f"step_{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Return the steps of which there is a checkpoint, valid or not, in rising order."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(step for name in names if step_name(step := int(name.removeprefix("step_"))) == name)


def open_checkpoint(path: Path, *, thorough: bool = True) -> Checkpoint:
    """Verify a checkpoint to the last byte and read its plain values.

    Args:
        path: its directory.
        thorough: False leaves the tensor files unread, but for their size: enough to list it, not to load it.

    Raises:
        DamagedCheckpointError: it is missing, cut short, altered, foreign or of a newer format; nothing was loaded.
    """
    try:
        if path.is_symlink():
            raise DamagedCheckpointError(f"{path}: is a link, not a directory")
        manifest = _read_json(path, "manifest.json")
        _verify(path, manifest, thorough)
        record = _read_json(path, "state.json")
        if record["progress"]["step"] != manifest["step"]:
            raise DamagedCheckpointError(f"{path}: state.json and manifest.json are of different steps")
        tensors = tuple(name for name in manifest["files"] if name.endswith(".safetensors"))
        return Checkpoint(path, manifest["step"], record, tensors)
    except DamagedCheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"{path}: is not laid out as a checkpoint ({error!r})") from error


def _read_json(path: Path, name: str) -> Any:
    _require_plain_file(path, name)
    if (path / name).stat().st_size > _LARGEST_JSON:
        raise DamagedCheckpointError(f"{path}: {name} is too large to be genuine")
    try:
        return json.loads((path / name).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"{path}: {name} cannot be read ({error})") from error


def _require_plain_file(path: Path, name: str) -> None:
    try:
        mode = (path / name).lstat().st_mode
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {name} is missing") from error
    if not stat.S_ISREG(mode):
        raise DamagedCheckpointError(f"{path}: {name} is no plain file (a link or a device)")


def _verify(path: Path, manifest: dict[str, Any], thorough: bool) -> None:
    if manifest["format"] > FORMAT:
        raise DamagedCheckpointError(
            f"{path}: has format {manifest['format']}, this program knows formats up to {FORMAT}; update the program"
        )
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest["digest"] != _digest(content):
        raise DamagedCheckpointError(f"{path}: manifest.json was altered (its own checksum differs)")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpointError(f"{path}: has the unknown format {manifest['format']}")
    if path.name != step_name(manifest["step"]):
        raise DamagedCheckpointError(f"{path}: holds step {manifest['step']}, not what its name says")
    listed = set(manifest["files"])
    missing = [f"{part}.safetensors" for part in REQUIRED if not complete(listed, part)]
    for name in [*missing, "rng.safetensors", "state.json"]:
        if name not in listed:
            raise DamagedCheckpointError(f"{path}: manifest.json does not list {name}")
    for name, expected in manifest["files"].items():
        if name not in KNOWN and not SHARD.fullmatch(name):
            raise DamagedCheckpointError(
                f"{path}: manifest.json lists {name!r}, which does not belong into a checkpoint"
            )
        _require_plain_file(path, name)
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise DamagedCheckpointError(f"{path}: {name} has {size} bytes instead of {expected['size']}")
        if not thorough and name.endswith(".safetensors"):
            continue
        try:
            found = storage.checksum(path / name)
            if name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):  # reads and checks the header
                    pass
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{path}: {name} cannot be read ({error})") from error
        if found != expected:
            raise DamagedCheckpointError(f"{path}: {name} was altered (its checksum differs)")


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, if any, and what is wrong with the newer ones."""
    damages: list[str] = []
    for step in reversed(list_steps(folder)):
        try:
            return open_checkpoint(folder / step_name(step)), damages
        except DamagedCheckpointError as error:
            damages.append(str(error))
    return None, damages


def find_best(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that the newest valid one calls the best; itself if there was no evaluation yet."""
    newest, damages = find_newest(folder)
    if newest is None:
        return None, damages
    step = newest.record["progress"]["best_step"]
    if step is None or step == newest.step:
        return newest, damages
    try:
        return open_checkpoint(folder / step_name(step)), damages
    except DamagedCheckpointError as error:
        return None, [*damages, str(error)]


def set_aside_newer(folder: Path, step: int | None) -> list[str]:
    """Move checkpoints newer than `step` (all, for None) out of the way; return their names.

    They are damaged, or the future of a run that now takes another course; a later start must not find them.
    """
    moved = []
    for newer in list_steps(folder):
        if step is None or newer > step:
            aside = folder / "set_aside"
            aside.mkdir(exist_ok=True)
            name = step_name(newer)
            target = aside / name
            for number in range(2, 10_000):
                if not target.exists():
                    break
                target = aside / f"{name}.{number}"
            (folder / name).rename(target)
            moved.append(name)
    return moved


class CheckpointWriter:
    """Writes checkpoints on rank 0 in the background; training stands still for the copy to host memory only.

    At most one is in flight. An error of the writing thread is raised by the next call.
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
        self.seconds = 0.0  # whole duration of the latest save
        self.blocked_seconds = 0.0  # how long training stood still for it
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._announced = False

    def save(self, files: dict[str, Tensors], record: dict[str, Any], also_flush: list[Path]) -> None:
        """Copy the state and return; a thread writes it.

        Args:
            files: full tensors of each file, on any device.
            record: plain values for state.json, among them record["progress"].
            also_flush: files that must be on the disk before the checkpoint exists.

        Raises:
            TrainingError: the checkpoint before could not be written.
        """
        start = time.perf_counter()
        self.wait()
        snapshot = {
            file: {name: self._copy(file, name, tensor) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the copies from the device are asynchronous
        self.blocked_seconds = time.perf_counter() - start
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
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

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
            steps = list_steps(self.folder)
            rest = f"the newest one is {step_name(steps[-1])}" if steps else "there is none yet"
            raise TrainingError(
                f"cannot write a checkpoint to {self.folder}: {error}. Checkpoints already there are intact; {rest}. "
                "Make room or mend the disk and run the same command again"
            ) from error

    def _copy(self, file: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[file, name] = buffer
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
                    self.folder / step_name(step), lambda path: self._fill(path, files, text, step)
                )
                self._prune(progress["best_step"])
            else:
                self._write_together(None, files)
            self.seconds = time.perf_counter() - start
        except Exception as error:  # handed to the training thread, which raises it
            self._error = error
            if leads and self._shards is not None and not self._announced:
                self._write_together(None, {})  # the others wait for the name of a directory

    def _fill(self, path: Path, files: dict[str, Tensors], text: str, step: int) -> None:
        """Write all files of a checkpoint into its temporary directory; with shards, together with the others."""
        entries = _write_tensors(path, files) if self._shards is None else self._write_together(path, files)
        entries["state.json"] = storage.write_durably(path / "state.json", [text.encode()])
        content = {"format": FORMAT, "step": step, "files": entries}
        manifest = json.dumps({**content, "digest": _digest(content)}, indent=1)
        storage.write_durably(path / "manifest.json", [manifest.encode()])

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
            mine = _write_tensors(box[0], files)
        except OSError as error:
            mine = error
        everyone: list[Any] = [None] * dist.get_world_size(self._shards)
        dist.all_gather_object(everyone, mine, group=self._shards)
        failed = [part for part in everyone if isinstance(part, OSError)]
        if failed:
            raise failed[0]
        return {name: entry for part in everyone for name, entry in part.items()}

    def _prune(self, best_step: int | None) -> None:
        for step in list_steps(self.folder)[: -self.keep]:
            if step != best_step:
                storage.remove_directory(self.folder / step_name(step))


def _write_tensors(path: Path, files: dict[str, Tensors]) -> dict[str, Any]:
    return {
        f"{name}.safetensors": storage.write_durably(path / f"{name}.safetensors", storage.tensor_chunks(tensors))
        for name, tensors in files.items()
    }
