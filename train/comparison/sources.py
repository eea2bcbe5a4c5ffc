"""From what was asked for to runs, each once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from train.comparison.directory import read_directory
from train.comparison.online import join_parts, read_file, read_online
from train.comparison.run import Run
from train.engine.errors import UsageError


def read_runs(sources: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Return the runs, in the order asked for and with names of their own, and what is to be said about them.

    Raises:
        UsageError: with all that cannot be read.
    """
    found: dict[str, list[Run]] = {}  # by what makes a run itself: its folder, else its id in W&B
    problems: list[str] = []
    for source in sources:
        try:
            run = _read(source)
        except UsageError as error:
            problems += error.problems
            continue
        found.setdefault(run.place or str(run.id), []).append(run)
    if problems:
        raise UsageError(problems)
    notes: list[str] = []
    in_folders = {run.id: run for (run, *_) in found.values() if run.place}
    runs = []
    for same in found.values():
        chosen = same[0]
        if not chosen.place and chosen.id in in_folders:
            notes += [f"{run.source}: is the run {in_folders[chosen.id].source}, counted once" for run in same]
            continue
        parts = {run.starts[0]: run for run in same}
        if len(parts) > 1 and all(run.starts_known and not run.place for run in same):
            chosen = join_parts(list(parts.values()))
            notes.append(f"{chosen.source}: starts of one run, put together")
        elif len(same) > 1:
            notes.append(f"{', '.join(run.source for run in same)}: one and the same run, counted once")
        runs.append(chosen)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = run.source
    return runs, notes + [note for run in runs for note in run.notes]


def _read(source: str) -> Run:
    path = Path(source)
    if path.is_dir():
        if any(path.glob("*.wandb")):
            return read_file(source)
        return read_directory(source)
    if path.is_file():
        if path.suffix == ".wandb":
            return read_file(source)
        raise UsageError(f"{source}: is a file; name the folder of a run, or a .wandb file")
    if re.fullmatch(r"[^/.][^/]*/[^/]+/[^/]+", source) and not path.parent.parent.exists():
        return read_online(source)
    raise UsageError(
        f"{source}: no such run; name the folder of one, such as runs/NAME, a .wandb file, or entity/project/run of W&B"
    )
