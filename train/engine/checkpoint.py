"""Find, verify and load checkpoints: safetensors and JSON, no pickle, never half there. writer.py makes them.

A checkpoint is a directory `step_00001200` with model, optimizer, rng (and ema) .safetensors, state.json, and
manifest.json, which was written last and holds size and checksum of each file. Without a valid manifest it does not
exist. Checksums catch accidents, not attackers; against those, nothing here can run code.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from train.engine import storage
from train.engine.sharded import SHARD, ShardedTensors, complete

FORMAT = 1
REQUIRED = ("model", "optimizer")  # each one file, or a shard of each process
KNOWN = (*(f"{part}.safetensors" for part in (*REQUIRED, "ema", "carried", "rng")), "state.json")
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
    if manifest["digest"] != digest(content):
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


def digest(content: dict[str, Any]) -> str:
    """Return the checksum of a manifest's content."""
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
