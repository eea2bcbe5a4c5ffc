"""W&B as one of Accelerate's trackers: one W&B run through all starts of a run, with exact steps (wandb 0.31).

Steps must not go back: online, W&B drops what it has already; offline, what is uploaded later is shifted. So a start
sends only the lines that W&B lacks: online those after the step that the service names, offline those after the last
one in the files of the starts before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from train.engine.errors import UsageError
from train.engine.run_directory import RunDirectory
from train.engine.settings import RunSettings
from train.engine.wandb_service import drop_empty_variables

INIT_TIMEOUT_SECONDS = 20
FINISH_TIMEOUT_SECONDS = 15
MOST_WAITING = 10_000  # lines that W&B has not taken yet
PATIENCE_SECONDS = 10  # for it to take one, when so many wait
ARTIFACT_SECONDS = 5  # for one without bytes
ARTIFACT_BYTES_PER_SECOND = 5e6
READ_TIMEOUT_SECONDS = 60  # of a file of an earlier start; it takes 2 s, most of it to start Python
PROJECT = "exact-training"
BY_STEP = ("reconstructions", "samples")  # folders of pictures of a step


class WandbTracker(GeneralTracker):
    """Sends metrics and pictures to W&B. Its methods raise whatever W&B raises; nothing waits without end.

    A thread of its own talks to W&B, in the order of the calls: a process of W&B that hangs would hold up training at
    some line, and at `finish` in spite of its time limit (0.31).

    Args:
        run: the run; keeps the id.
        settings: of this start.
        record: of this start, as run.json has it.
    """

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run: RunDirectory, settings: RunSettings, record: dict[str, Any]) -> None:
        super().__init__()
        self.run: Any = None
        self._directory = run
        self._settings = settings
        self._record = record
        self._sent = -1  # the last step that W&B has
        self._show_first_batch = False
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._failure: Exception | None = None
        self._seconds: float = FINISH_TIMEOUT_SECONDS + 2  # that `finish` waits

    @property
    def tracker(self) -> Any:
        """The run of the package wandb."""
        return self.run

    def start(self) -> None:
        """Open the W&B run: online where that is possible, else offline."""
        import wandb

        # On a full disk, the log of W&B would print a traceback for each of its lines.
        logging.raiseExceptions = False
        # It would print how it fails to report its own failures to its makers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._choose_cache()
        wandb.setup(wandb.Settings(silent=True))
        mode = os.environ.get("WANDB_MODE") or "online"
        told = "W&B: offline"
        if mode == "online":
            try:
                # Not verified: where the service is down, that takes 11 s more, and `wandb.init` finds out, too.
                if wandb.login(prompt=False, verify=False):
                    self._open(mode)
                else:
                    told = "W&B: offline (there is no key)"
            except Exception as error:  # whatever it is, what is kept offline can be uploaded later
                reason = " ".join(str(error).split())
                told = f"warning: W&B does not answer, or refuses the key ({reason}): offline"
                wandb.teardown()  # it would take the run for open
                wandb.setup(wandb.Settings(silent=True))
        if self.run is None:
            self._open("offline" if mode == "online" else mode)
        if self.run.offline:
            print(f"{told}; upload later with: python launch/wandb_sync.py {self._directory.path}", flush=True)
            self._sent = self._last_step_on_disk()
        else:
            if self.run.url:  # disabled, it has none
                print(f"W&B: {self.run.url}", flush=True)
            self._sent = self.run.starting_step - 1
        self._show_first_batch = self._sent < 0
        self._thread.start()

    def _choose_cache(self) -> None:
        """Let W&B keep its logs in the run where the home directory cannot be written, as in some containers."""
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            (cache / "wandb").mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: there is no home directory
            os.environ["XDG_CACHE_HOME"] = str(self._directory.path / "wandb" / "cache")

    def _open(self, mode: str) -> None:
        import wandb

        variables, run = os.environ, self._directory
        if run.identity.get("wandb_id") is None:
            project = self._settings.wandb_project or variables.get("WANDB_PROJECT") or PROJECT
            run.remember(wandb_id=run.identity["id"], wandb_project=project)
        commit = self._record["commit"]
        array = self._record["scheduler"].get("SLURM_ARRAY_JOB_ID")
        self.run = wandb.init(
            project=run.identity["wandb_project"],
            id=run.identity["wandb_id"],
            name=variables.get("WANDB_NAME") or run.path.name,
            group=variables.get("WANDB_RUN_GROUP") or array,
            job_type=variables.get("WANDB_JOB_TYPE") or Path(sys.argv[0]).stem,
            dir=str(run.path),
            config={**dataclasses.asdict(self._settings), "start": self._record},
            mode=mode,  # type: ignore[arg-type]
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
                git_commit=commit and commit.partition("+")[0],
            ),
        )

    def _last_step_on_disk(self) -> int:
        """Return the last step in the files of earlier starts, -1 if there is none. The newest file knows it."""
        identity = self._directory.identity["wandb_id"]
        files = self._directory.path.glob(f"wandb/*run-*-{identity}/run-{identity}.wandb")
        before = [file for file in files if file.parent != Path(self.run.dir).parent]
        for file in sorted(before, key=_started, reverse=True):
            # Of a file that a kill tore, the whole records are printed. Rows count: the summary is written before
            # its row, and may know of one that is lost.
            read = subprocess.run(
                [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=READ_TIMEOUT_SECONDS,
            )
            rows = [line for line in read.stdout.splitlines() if b'"type":"history"' in line]
            if rows:
                return int(json.loads(rows[-1])["history"]["step"]["num"])
        return -1

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Send a line, with the pictures of its step, unless W&B has it."""
        assert step is not None
        if step > self._sent:
            line = dict(values)
            self._let(lambda: self.run.log(line | self._pictures_of(step), step=step))
            self._sent = step

    def _pictures_of(self, step: int) -> dict[str, Any]:
        plots = self._directory.plots
        paths = {folder: plots / folder / f"step_{step:08d}.png" for folder in BY_STEP}
        if self._show_first_batch:
            paths["first_batch"] = plots / "first_batch.png"
            self._show_first_batch = False
        return _load_images({name: path for name, path in paths.items() if path.exists()})

    def summarize(self, values: dict[str, float]) -> None:
        """Write the results of a finished run into the summary."""
        self._let(lambda: self.run.summary.update(values))

    def show(self, checkpoints: dict[str, Path]) -> None:
        """Write the pictures of the run into the summary, and store checkpoints as artifacts if that is wanted."""
        plots = {path.stem: path for path in self._directory.plots.glob("*.png") if path.stem != "first_batch"}
        self._let(lambda: self.run.summary.update(_load_images(plots)))
        if self._settings.wandb_artifact:
            for name, path in checkpoints.items():
                size = sum(file.stat().st_size for file in path.iterdir())
                self._seconds += ARTIFACT_SECONDS + size / ARTIFACT_BYTES_PER_SECOND
                self._let(partial(self._store, name, path))

    def _store(self, name: str, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.run.id}-{name}", type="checkpoint", metadata={"folder": path.name})
        # Immutable: sent from where they lie; otherwise W&B would first copy them into the home directory.
        artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        try:
            logged = self.run.log_artifact(artifact, aliases=[name])
            if not self.run.offline:
                logged.wait()
        except Exception as error:  # of many kinds
            raise RuntimeError(f"the artifact {artifact.name} was not stored: {error}") from error

    def finish(self) -> None:
        """Send what is left, for a bounded time.

        Raises:
            TimeoutError: the service did not take everything.
        """
        self._let(lambda: self.run.finish())
        self._let(None)
        self._thread.join(self._seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"not everything was taken in {self._seconds:.0f} s")
        if self._failure is not None:
            raise self._failure

    def _let(self, act: Callable[[], None] | None) -> None:
        """Let the thread act, after all that it was told before; None ends it."""
        if self._failure is not None:
            raise self._failure
        try:
            self._jobs.put(act, timeout=PATIENCE_SECONDS)
        except queue.Full:
            raise TimeoutError(f"it takes nothing, and {MOST_WAITING:,} lines wait") from None

    def _work(self) -> None:
        try:
            while (act := self._jobs.get()) is not None:
                act()
        except Exception as error:  # of any kind; the next call raises it
            self._failure = error


def check_variables(settings: RunSettings) -> None:
    """Refuse variables that W&B would refuse when the run has begun; empty ones count as not set.

    Raises:
        UsageError: names them.
    """
    if "wandb" not in settings.tracker or os.environ.get("RANK", "0") != "0":
        return
    import wandb

    drop_empty_variables()
    problems = []
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        try:
            wandb.Settings().update_from_env_vars({name: os.environ[name]})
        except Exception as error:  # of several kinds
            problems.append(f"{name}={os.environ[name]}: W&B refuses it ({_say_briefly(error)})")
    try:
        wandb.Settings(project=settings.wandb_project)
    except Exception as error:
        problems.append(f"--wandb_project {settings.wandb_project}: W&B refuses it ({_say_briefly(error)})")
    if problems:
        raise UsageError(problems)


def _say_briefly(error: Exception) -> str:
    """Return the message of an error, of one of pydantic without its dressing."""
    first = str(error.errors()[0]["msg"]) if hasattr(error, "errors") else str(error)
    return " ".join(first.split())


def _started(file: Path) -> str:
    """Return the time at which W&B made the folder of a file: offline-run-TIME-ID or run-TIME-ID."""
    return file.parent.name.removeprefix("offline-")


def _load_images(paths: dict[str, Path]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Image(str(path)) for name, path in paths.items()}
