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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.wandb_file import Fragment, read_fragment, write_rest

ANSWER_SECONDS = 20
RETRIES = 3  # of a question
ARRIVAL_SECONDS = 60  # W&B shows what it took a little later
UPLOAD_SECONDS = 900  # of one fragment, pictures included; wandb itself tries for hours
LOOK_SECONDS = 10  # between two questions, in an upload, whether W&B is still there
INTERRUPTED = 130

Outcome = tuple[str, str, str, bool]  # a fragment, its steps, what became of it, whether that is well
Rows = dict[int, dict[str, Any]]  # by step


class SyncError(Exception):
    """A run cannot be uploaded; says why."""


class ServiceLostError(SyncError):
    """W&B does not answer; nor will it for the next run."""


class Service:
    """W&B, as far as it is asked."""

    def __init__(self) -> None:
        import wandb

        try:
            self._api = wandb.Api(timeout=ANSWER_SECONDS)
            self._user = self._api.default_entity
        except Exception as error:  # of many kinds
            raise ServiceLostError(f"W&B does not answer, or refuses the key: {_one_line(error)}") from error

    def look_up(self, fragment: Fragment) -> tuple[int, int]:
        """Return the last step that W&B has of the run, -1 if it has none, and how many rows.

        Raises:
            ServiceLostError: it does not answer.
        """
        # Runs are remembered as they were.
        self._api.flush()
        try:
            run = self._api.run(f"{fragment.entity or self._user}/{fragment.project}/{fragment.run}")
            return int(run.lastHistoryStep), int(run._attrs["historyLineCount"])
        except Exception as error:  # of many kinds
            if "Could not find run" in str(error):
                return -1, 0
            raise ServiceLostError(f"W&B does not answer: {_one_line(error)}") from error

    def count_rows(self, fragment: Fragment, wanted: int) -> int:
        """Return how many rows W&B has of the run, after a while if it is fewer than wanted."""
        end = time.monotonic() + ARRIVAL_SECONDS
        while (rows := self.look_up(fragment)[1]) < wanted and time.monotonic() < end:
            time.sleep(1)
        return rows

    def upload(self, fragment: Fragment, after: int, others: Rows) -> None:
        """Upload what a fragment holds after a step, with other rows, and wait until W&B has the last one.

        Raises:
            SyncError: it did not arrive.
        """
        source = fragment.path.parent
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "offline-" + source.name.removeprefix("offline-"))  # others it passes over
            copy.mkdir()
            (copy / "files").symlink_to(source / "files")
            write_rest(fragment, copy / fragment.path.name, after, others)
            output = self._run_sync(copy, fragment)
        end, last = time.monotonic() + ARRIVAL_SECONDS, max([after, *fragment.steps, *others])
        while self.look_up(fragment)[0] < last:
            if time.monotonic() > end:
                raise SyncError(f"step {last} did not arrive; wandb sync said: {output[-300:]}")
            time.sleep(1)
        fragment.path.with_name(fragment.path.name + ".synced").touch()  # where `wandb sync` looks

    def _run_sync(self, folder: Path, fragment: Fragment) -> str:
        """Run W&B's own upload, whose exit code is 0 even where nothing was uploaded (0.31); return what it said."""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            command = [sys.executable, "-m", "wandb", "sync", str(folder)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                end = time.monotonic() + UPLOAD_SECONDS
                while process.poll() is None:
                    if time.monotonic() > end:
                        raise SyncError(f"took more than {UPLOAD_SECONDS} s; repeat this, and the rest is sent")
                    try:
                        process.wait(min(LOOK_SECONDS, UPLOAD_SECONDS))
                    except subprocess.TimeoutExpired:
                        self.look_up(fragment)
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            return output.read()


def find_files(folders: Sequence[Path]) -> list[Path]:
    """Return the files of W&B below folders, with those of other starts of the same runs, in the order of the starts.

    A start that is uploaded before an earlier one would leave that out for good.
    """
    found = {path.resolve() for folder in folders for path in folder.rglob("run-*.wandb")}
    found = {other for path in found for other in path.parents[1].glob(f"*/{path.name}")}
    # latest-run is a link that some ways of copying turn into a folder.
    found = {path for path in found if path.parent.name != "latest-run"}
    return sorted(found, key=lambda path: (*_run_of(path), path.parent.name.removeprefix("offline-")))


def _run_of(file: Path) -> tuple[Path, str]:
    """Return what the files RUN/wandb/START/run-ID.wandb of a run have in common."""
    return file.parents[2], file.name


def is_in_use(run: Path) -> bool:
    """Say whether a process still writes a run."""
    lock = run / "run.lock"
    if not lock.exists():
        return False
    with open(lock, encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_rows(run: Path) -> Rows:
    """Return what a run's metrics.jsonl has for rows of W&B; a torn last line does not count."""
    rows: Rows = {}
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                break
            step, seconds = values.pop("step"), values.pop("time")
            values = {name: value for name, value in values.items() if not name.startswith("test/")}
            if values:
                rows.setdefault(step, {"_timestamp": seconds}).update(values)
    return rows


def sync(files: Sequence[Path], service: Service) -> Iterator[Outcome]:
    """Upload the files of all runs; yield what became of each.

    Raises:
        ServiceLostError: W&B does not answer.
    """
    for (run, _), group in itertools.groupby(files, key=_run_of):
        yield from _sync_run(run, list(group), service)


def _sync_run(run: Path, files: Sequence[Path], service: Service) -> Iterator[Outcome]:
    if is_in_use(run):
        yield run.name, "", "failed: the run goes on; repeat this when it has ended", False
        return
    rows = read_rows(run)
    fragments = [(file, read_fragment(file)) for file in files]
    whole = [fragment for _, fragment in fragments if fragment is not None]
    failed, first = False, 0
    for file, fragment in fragments:
        name = f"{run.name}/{file.parent.name}"
        if fragment is None:
            yield name, "", f"skipped: torn, nothing whole in its {file.stat().st_size} bytes", True
            continue
        later = [step for other in whole[whole.index(fragment) + 1 :] for step in other.steps]
        end = min(later, default=max(rows, default=0) + 1)
        others, first = {step: row for step, row in rows.items() if first <= step < end}, end
        steps = sorted({*fragment.steps, *others})
        shown = f"{steps[0]} to {steps[-1]}" if steps else "none"
        try:
            if failed:
                raise SyncError("not tried, since one before it failed")
            yield name, shown, _sync_fragment(fragment, others, service), True
        except ServiceLostError as error:
            yield name, shown, f"failed: {error}", False
            raise
        except SyncError as error:
            failed = True
            yield name, shown, f"failed: {error}", False
    if whole and not failed:
        wanted = len({*rows, *(step for fragment in whole for step in fragment.steps)})
        there = service.count_rows(whole[-1], wanted)
        if there < wanted:
            lost = f"failed: W&B has {there} of {wanted} rows, and takes none before its last; all are in metrics.jsonl"
            yield run.name, "", lost, False


def _sync_fragment(fragment: Fragment, others: Rows, service: Service) -> str:
    """Upload what W&B lacks of a fragment, and of other rows up to the next one."""
    there, _ = service.look_up(fragment)
    own = [step for step in fragment.steps if step > there]
    others = {step: row for step, row in others.items() if step > there and step not in fragment.steps}
    # The last start of a run may bring results, which are in no row. Of others, they would overwrite newer ones.
    offline = fragment.path.parent.name.startswith("offline-")
    last = max(fragment.steps, default=there) == there
    results = offline and last and not Path(f"{fragment.path}.synced").exists()
    if not own and not others and not results:
        return "was there"
    service.upload(fragment, there, others)
    if not own and not others:
        return "uploaded results, had no new rows"
    rest = f" and {len(others)} of metrics.jsonl" if others else ""
    return f"uploaded {len(own)} of {len(fragment.steps)} rows{rest}, verified"


def print_outcomes(outcomes: Iterator[Outcome]) -> bool:
    """Print what becomes of each fragment, as it comes; say whether all is well."""
    all_well, width = True, 0
    for name, steps, told, well in outcomes:
        width = max(width, len(name))
        print(f"{name:{width}}  {steps:14}  {told}", flush=True)
        all_well = all_well and well
    return all_well


def _one_line(error: Any) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]


def main(arguments: Sequence[str]) -> int:
    """Upload, say what was done, and return the exit code.

    Raises:
        SystemExit: with code 2 for bad usage: no such folder, no runs in it, or no key.
    """
    parser = argparse.ArgumentParser(prog="python launch/wandb_sync.py", description="Upload W&B runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder of runs")
    folders = parser.parse_args(arguments).folders
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder}: there is no such folder")
    files = find_files(folders)
    if not files:
        parser.error("there are no W&B runs below " + " ".join(map(str, folders)))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"WANDB_MODE": "online", "WANDB_DIR": scratch}  # its logs, otherwise in this folder
        return _sync_all(parser, files)


def _sync_all(parser: argparse.ArgumentParser, files: Sequence[Path]) -> int:
    import wandb

    # Otherwise a question is repeated for minutes when the service is gone.
    wandb.setup(wandb.Settings(silent=True, x_graphql_retry_max=RETRIES, x_graphql_retry_wait_max_seconds=2))
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
    try:
        return 0 if print_outcomes(sync(files, service)) else 1
    except ServiceLostError:
        print("stopped: repeat this when W&B answers, and the rest is sent", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: repeat this, and the rest is sent", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # Python would wait for W&B's own process, which does not always end (wandb 0.31)
