"""The run's folder and the room that checkpoints will take."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from train.engine import checkpoint, storage
from train.engine.checks.finding import Finding, judge, listing, skip
from train.engine.checks.subject import Subject
from train.engine.tensors import named_tensors

SIGHT_SECONDS = 3.0  # for a file to appear on other hosts: network file systems keep what they know of a folder a while
SMALL_FILES = 50 * 2**20  # bytes, generously: metrics, pictures, state.json, generators, what a tracker keeps
FILES_BESIDE = 20  # of a run, besides its checkpoints
# Tensors that an optimizer keeps for each parameter, at most.
MOMENTS = {"adam": 2, "adamw": 2, "muon": 2, "sgd": 1}


def check_folder(subject: Subject) -> Iterator[Finding]:
    """Save something small from every process as a checkpoint is saved, and see whether all see the same folder."""
    run, runtime = subject.session.run, subject.runtime
    if run is None:
        yield skip("run folder", "a dry run writes nothing")
        return
    token = runtime.broadcast(secrets.token_hex(8))
    error, seconds = _try_to_save(run.checkpoints, runtime.rank)
    sign = run.checkpoints / ".tmp-preflight-token"  # swept at the next start, should this one be killed here
    if runtime.is_main:
        _write_token(sign, token)
    runtime.broadcast(None)  # it is there now
    sees = _wait_for_token(sign, token)
    everyone = runtime.share({"host": socket.gethostname(), "error": error, "seconds": seconds, "sees": sees})
    if runtime.is_main:
        sign.unlink(missing_ok=True)
    yield _judge_folder(run.path, everyone, subject.settings.checkpoint_format == "sharded")


def _judge_folder(path: Path, everyone: list[dict[str, Any]], sharded: bool) -> Finding:
    cannot_write = [place(rank, facts) for rank, facts in enumerate(everyone) if facts["error"]]
    seen = [facts["sees"] or bool(everyone[0]["error"]) for facts in everyone]  # what rank 0 cannot write, nobody sees
    blind = [place(rank, facts) for rank, (facts, sees) in enumerate(zip(everyone, seen)) if not sees]
    needed = everyone if sharded else everyone[:1]
    failed = any(facts["error"] for facts in needed) or (sharded and bool(blind))
    said = [f"{path}: {len(everyone) - len(cannot_write)} of {len(everyone)} process(es) could save"]
    causes = []
    if cannot_write:
        said.append(f"not {listing(cannot_write)}: {next(facts['error'] for facts in everyone if facts['error'])}")
        causes.append("full, read-only, or of another user: df and ls -ld show it; --output_dir takes another folder")
    if blind:
        said.append(f"{listing(blind)} do not see what rank 0 writes")
        causes.insert(
            0,
            "the folder is not the same on all hosts, so they cannot resume: use a file system that all hosts share, "
            "--output_dir",
        )
    return judge(
        "run folder",
        not cannot_write and not blind,
        ", ".join(said),
        "all processes write, flush, rename, read back and remove a file there, and see those of the others",
        tuple(causes),
        otherwise="fail" if failed else "warn",
        processes=everyone,
    )


def _try_to_save(folder: Path, rank: int) -> tuple[str, float]:
    """Commit, read back and remove a small directory; return what went wrong, and the seconds it took."""
    final = folder / f".tmp-preflight-{rank:05d}"
    content = bytes(range(256)) * 16
    start = time.perf_counter()
    try:
        storage.remove_tree(final)
        storage.commit_directory(final, lambda path: _write(path / "file", content))
        right = (final / "file").read_bytes() == content
        storage.remove_directory(final)
    except OSError as error:
        return error.strerror or type(error).__name__, time.perf_counter() - start
    return "" if right else "reads back other bytes than were written", time.perf_counter() - start


def _write(path: Path, content: bytes) -> None:
    storage.write_durably(path, [content])


def _write_token(sign: Path, token: str) -> None:
    """Write it if that is possible at all; whether it was comes out where it is read."""
    try:
        storage.remove_tree(sign)
        _write(sign, token.encode())
    except OSError:
        return


def _wait_for_token(sign: Path, token: str) -> bool:
    """Say whether the token that rank 0 wrote in this very start can be read here."""
    end = time.monotonic() + SIGHT_SECONDS
    while True:
        try:
            if sign.read_bytes() == token.encode():
                return True
        except OSError:
            pass  # not there yet, or not to be seen from here
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Compare the room that the run's checkpoints will take with what is free.

    A quota of the user or the project cannot be seen this way: the file system tells of its own room only.
    """
    if subject.session.run is None:
        yield skip("disk space", "a dry run writes nothing")
        return
    folder, settings, state = subject.session.run.checkpoints, subject.settings, subject.state
    weights = sum(_num_bytes(tensor) for tensor in named_tensors(state.model)[0].values())
    moments = MOMENTS[settings.optimizer] * sum(
        _num_bytes(parameter) for parameter in state.model.parameters() if parameter.requires_grad
    )
    averages = sum(_num_bytes(tensor) for tensor in (state.ema or {}).values())
    one = weights + moments + averages
    copies = settings.keep_checkpoints + 2  # the best one, and one that is being written
    files = (3 if settings.checkpoint_format == "whole" else 3 * subject.runtime.num_processes) + 3
    yield subject.runtime.on_main(lambda: _judge_disk(folder, one, copies, files))


def _judge_disk(folder: Path, one: int, copies: int, files: int) -> Finding:
    try:
        free, inodes = shutil.disk_usage(folder).free, _free_inodes(folder)
        there = sum(_size_of(folder / checkpoint.step_name(step)) for step in checkpoint.list_steps(folder))
    except OSError as error:
        return skip("disk space", f"cannot be told: {error.strerror}")
    # What older checkpoints of this run take is given back as new ones come.
    needed = max(0, one * copies - there) + SMALL_FILES
    short_of_files = inodes is not None and inodes < files * copies + FILES_BESIDE
    said = (
        f"{_size(free)} free, {_size(needed)} needed: {copies} checkpoints of {_size(one)} and {_size(SMALL_FILES)} "
        "beside"
    )
    if there:
        said += f", less {_size(there)} that are there"
    if short_of_files:
        said += f"; room for {inodes} more files only"
    return judge(
        "disk space",
        free >= 2 * needed and not short_of_files,
        said,
        "twice of what is needed",
        (
            "too many checkpoints for this disk: --keep_checkpoints 1",
            "other files fill the disk: remove some, or choose another folder with --output_dir",
        ),
        otherwise="fail" if free < needed or short_of_files else "warn",
        free=free,
        needed=needed,
        one_checkpoint=one,
        copies=copies,
        there=there,
        free_files=inodes,
    )


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of a sharded tensor, too, numel counts the whole


def _free_inodes(folder: Path) -> int | None:
    """Return how many files may still be made, None where the file system sets no number."""
    status = os.statvfs(folder)
    return status.f_favail if status.f_files else None


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _size(count: int) -> str:
    """Return bytes as people read them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count / 1000:.3g} kB"


def place(rank: int, facts: dict[str, Any]) -> str:
    return f"rank {rank} on {facts['host']}"
