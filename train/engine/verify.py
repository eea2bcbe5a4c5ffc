"""--verify_resume: show on the user's own configuration that a killed and restarted run equals a straight one.

Both runs are fresh processes that take a few steps in a temporary folder: one straight through, one that kills itself
in between and is started again. Their last checkpoints are compared tensor by tensor. Under a launcher every rank does
this, and the children of all ranks form the process groups.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train.engine.errors import EXIT_DONE, EXIT_PREFLIGHT, TrainingError
from train.engine.settings import RunSettings

STEPS = 8
SAVE_EVERY = 2
KILL_AFTER = 5  # resumes from step 4, between two saves


def verify_resume(settings: RunSettings, script: str) -> int:
    """Run the comparison; return 0 if all tensors are equal to the last bit, else 3.

    Raises:
        TrainingError: a run failed by itself; its output is part of the message.
    """
    from train.engine.cli import settings_to_yaml

    rank = int(os.environ.get("RANK", "0"))
    # All ranks must name the same folder; the launcher, their parent, is the same process on one machine.
    folder = Path(tempfile.gettempdir()) / f"verify-resume-{os.getppid()}"
    folder.mkdir(exist_ok=True)
    changed: dict[str, Any] = {
        "output_dir": str(folder),
        "resume": "auto",
        "max_train_steps": STEPS,
        "checkpoint_every": str(SAVE_EVERY),
        "keep_checkpoints": STEPS,
        "tracker": ("none",),
        "dry_run": False,
        "verify_resume": False,
        "log_every": 1,
    }
    if hasattr(settings, "preflight"):
        changed["preflight"] = "off"
    recipe = folder / f"recipe_{rank}.yaml"
    recipe.write_text(settings_to_yaml(dataclasses.replace(settings, **changed)), encoding="utf-8")
    try:
        for number, (name, kill_after) in enumerate((("straight", 0), ("restarted", KILL_AFTER), ("restarted", 0))):
            code, output = _run(script, recipe, name, kill_after, number)
            if (code != 0) != bool(kill_after):
                raise TrainingError(f"--verify_resume: the {name} run ended with exit code {code}:\n{output}")
        return _compare(folder) if rank == 0 else EXIT_DONE
    finally:
        if rank == 0:
            from train.engine.storage import remove_tree

            remove_tree(folder)


def _run(script: str, recipe: Path, name: str, kill_after: int, number: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "train.engine.verify", str(kill_after), script]
    command += ["--config", str(recipe), "--run_name", name]
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:  # a group of their own for each of the three starts
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + 1 + number)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return finished.returncode, finished.stdout


def _compare(folder: Path) -> int:
    from train.engine.checkpoint import open_checkpoint, step_name

    straight, restarted = (
        open_checkpoint(folder / name / "checkpoints" / step_name(STEPS)).load() for name in ("straight", "restarted")
    )
    different = 0
    for file in sorted(straight.keys() | restarted.keys()):
        one, other = straight.get(file, {}), restarted.get(file, {})
        for name in sorted(one.keys() | other.keys()):
            equal = name in one and name in other and one[name].equal(other[name])
            different += not equal
            if not equal:
                both = name in one and name in other and one[name].shape == other[name].shape
                distance = float((one[name].double() - other[name].double()).abs().max()) if both else float("nan")
                print(f"differs: {file} {name}, at most by {distance:.3g}")
        print(f"{file}: {len(one)} tensors compared")
    verdict = "equal to the last bit" if not different else f"{different} tensors differ"
    print(f"{STEPS} steps straight, and killed after {KILL_AFTER} and restarted: {verdict}")
    return EXIT_PREFLIGHT if different else EXIT_DONE


def _be_killed(kill_after: int, script: str, arguments: list[str]) -> None:
    """Run a script in this process, which kills itself after a step."""
    from train.engine.preemption import Preemption
    from train.engine.saver import Saver

    if kill_after:
        go_on = Saver.watch

        def watch(saver: Saver, preemption: Preemption) -> None:
            if saver.state.progress.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            go_on(saver, preemption)

        Saver.watch = watch  # type: ignore[method-assign, assignment]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _be_killed(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
