"""Uploads the W&B runs that lie below folders, and asks W&B whether they arrived.

python launch/wandb_sync.py FOLDER [FOLDER ...]

A run has a fragment for each of its starts. They are uploaded in order, and of each only the rows that W&B lacks, so
that this can be interrupted and repeated. Exit codes: 0 all is there; 1 something is not; 2 bad usage.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.wandb_file import Fragment, read_fragment, write_rest

ANSWER_SECONDS = 20
ARRIVAL_SECONDS = 60  # W&B shows what it took a little later
UPLOAD_SECONDS = 900  # of one fragment, pictures included; wandb itself tries for hours

Outcome = tuple[str, str, str, bool]  # a fragment, its steps, what became of it, whether that is well


class SyncError(Exception):
    """A run cannot be uploaded; says why."""


class Service:
    """W&B, as far as it is asked."""

    def __init__(self) -> None:
        import wandb

        try:
            self._api = wandb.Api(timeout=ANSWER_SECONDS)
            self._user = self._api.default_entity
        except Exception as error:  # of many kinds
            raise SyncError(f"W&B does not answer, or refuses the key: {_one_line(error)}") from error

    def last_step(self, fragment: Fragment) -> int:
        """Return the last step that W&B has of the run, -1 if it has none.

        Raises:
            SyncError: it does not answer.
        """
        from wandb.errors import CommError

        # Runs are remembered as they were.
        self._api.flush()
        try:
            run = self._api.run(f"{fragment.entity or self._user}/{fragment.project}/{fragment.run}")
            return int(run.lastHistoryStep)
        except CommError as error:
            if "Could not find run" in str(error):
                return -1
            raise SyncError(f"W&B does not answer: {_one_line(error)}") from error

    def upload(self, fragment: Fragment, after: int) -> None:
        """Upload what a fragment holds after a step, and wait until W&B has its last row.

        Raises:
            SyncError: it did not arrive.
        """
        source = fragment.path.parent
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "offline-" + source.name.removeprefix("offline-"))  # others it passes over
            copy.mkdir()
            (copy / "files").symlink_to(source / "files")
            write_rest(fragment, copy / fragment.path.name, after)
            output = _run_sync(copy)
        end = time.monotonic() + ARRIVAL_SECONDS
        while self.last_step(fragment) < max(fragment.steps, default=-1):
            if time.monotonic() > end:
                raise SyncError(f"step {fragment.steps[-1]} did not arrive; wandb sync said: {output[-300:]}")
            time.sleep(1)
        fragment.path.with_name(fragment.path.name + ".synced").touch()  # where `wandb sync` looks


def _run_sync(folder: Path) -> str:
    # Its exit code is 0 even where nothing was uploaded (0.31).
    try:
        return subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=UPLOAD_SECONDS,
        ).stdout
    except subprocess.TimeoutExpired as error:
        raise SyncError(f"took more than {UPLOAD_SECONDS} s; repeat this, and the rest is sent") from error


def find_files(folders: Sequence[Path]) -> list[Path]:
    """Return the files of W&B below folders, those of a run in the order of its starts."""
    found = {path.resolve() for folder in folders for path in folder.rglob("run-*.wandb")}
    # latest-run is a link that some ways of copying turn into a folder.
    found = {path for path in found if path.parent.name != "latest-run"}
    return sorted(found, key=lambda path: (path.parents[1], path.parent.name.removeprefix("offline-")))


def is_in_use(file: Path) -> bool:
    """Say whether a process still writes the run RUN/wandb/START/run-ID.wandb."""
    lock = file.parents[2] / "run.lock"
    if not lock.exists():
        return False
    with open(lock, encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def last_metrics(run: Path) -> int:
    """Return the last step in a run's metrics.jsonl, -1 if there is none; a torn last line does not count."""
    step = -1
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            try:
                step = max(step, json.loads(line)["step"])
            except ValueError:
                break
    return step


def sync(files: Sequence[Path], service: Service) -> list[Outcome]:
    """Upload the files of all runs; return what became of each."""
    runs = itertools.groupby(files, key=lambda file: file.parents[2])
    return [outcome for run, group in runs for outcome in _sync_run(run, list(group), service)]


def _sync_run(run: Path, files: Sequence[Path], service: Service) -> list[Outcome]:
    outcomes: list[Outcome] = []
    newest: Fragment | None = None
    for file in files:
        name, fragment = f"{run.name}/{file.parent.name}", read_fragment(file)
        if fragment is None:
            outcomes.append((name, "", f"skipped: torn, nothing whole in its {file.stat().st_size} bytes", True))
            continue
        steps = f"{fragment.steps[0]} to {fragment.steps[-1]}" if fragment.steps else "none"
        try:
            if not all(well for *_, well in outcomes):
                raise SyncError("not tried, since one before it failed")
            if is_in_use(file):
                raise SyncError("the run goes on; repeat this when it has ended")
            outcomes.append((name, steps, _sync_fragment(fragment, service), True))
            newest = fragment
        except SyncError as error:
            outcomes.append((name, steps, f"failed: {error}", False))
    if newest is not None and all(well for *_, well in outcomes):
        there, wanted = service.last_step(newest), last_metrics(run)
        if there < wanted:
            advice = "give the command of the run again, which sends them, offline too"
            steps = f"{there + 1} to {wanted}"
            outcomes.append((run.name, steps, f"failed: only metrics.jsonl has these: {advice}", False))
    return outcomes


def _sync_fragment(fragment: Fragment, service: Service) -> str:
    there = service.last_step(fragment)
    rows = sum(step > there for step in fragment.steps)
    # The last start of a run may bring results, which are in no row. Of others, they would overwrite newer ones.
    offline = fragment.path.parent.name.startswith("offline-")
    last = max(fragment.steps, default=there) == there
    results = offline and last and not Path(f"{fragment.path}.synced").exists()
    if not rows and not results:
        return "was there"
    service.upload(fragment, there)
    return f"uploaded {rows} of {len(fragment.steps)} rows, verified" if rows else "uploaded results, had no new rows"


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print what became of each fragment."""
    rows = [("fragment", "steps", "outcome"), *(outcome[:3] for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, steps, outcome in rows:
        print(f"{name:{widths[0]}}  {steps:{widths[1]}}  {outcome}")


def _one_line(error: Any) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]


def main(arguments: Sequence[str]) -> int:
    """Upload, say what was done, and return the exit code.

    Raises:
        SystemExit: with code 2 for bad usage: no such folder, or no key.
    """
    parser = argparse.ArgumentParser(prog="python launch/wandb_sync.py", description="Upload W&B runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder of runs")
    folders = parser.parse_args(arguments).folders
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder}: there is no such folder")
    files = find_files(folders)
    if not files:
        print("no W&B runs below: " + " ".join(map(str, folders)))
        return 0
    os.environ["WANDB_MODE"] = "online"
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key that is none
        parser.error(f"W&B refuses the key: {_one_line(error)}")
    if not has_key:
        parser.error("there is no key: set WANDB_API_KEY, or run: wandb login")
    try:
        service = Service()
    except SyncError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcomes = sync(files, service)
    print_table(outcomes)
    return 0 if all(well for *_, well in outcomes) else 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # Python would wait for W&B's own process, which does not always end (wandb 0.31)
