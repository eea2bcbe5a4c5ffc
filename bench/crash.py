"""What is left after SIGKILL at random instants and after damage, beside accelerate's save_state.

    python bench/crash.py --kills 1000 --corruptions 1000 --minutes 60

Writes docs/reliability.md, with the numbers that were reached in the time given. To try it: smaller numbers and --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests.process, which starts scripts in a fraction of a second

import accelerate  # noqa: E402
import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from tests.damage import KINDS, corrupt  # noqa: E402
from tests.process.fleet import CONTEXT, Fleet  # noqa: E402
from train.engine import storage  # noqa: E402
from train.engine.checkpoint import find_newest, list_steps  # noqa: E402
from train.engine.runtime import Runtime  # noqa: E402
from train.engine.state import Progress, RunState, capture, restore  # noqa: E402
from train.engine.writer import CheckpointWriter  # noqa: E402

SIDES = {
    "ours": "this project",
    "same": "`save_state`, the same directory",
    "automatic": "`save_state`, automatic naming",
}
WIDTH = 1300  # a layer of 1,300 x 1,300 with Adam's two moments: 20.3 MB
KEEP = 2
STEPS = 400
TRAINING = [
    "--tracker", "none", "--model", "mnist_cnn", "--batch_size", "160", "--ema_decay", "0.9", "--lr_scheduler",
    "cosine", "--log_every", "1", "--checkpoint_every", "1", "--keep_checkpoints", "2",
]  # fmt: skip


# ---- one state, saved in three ways ----------------------------------------------------------------------------------


class Saver:
    """A layer with AdamW, a schedule and generators, in which every number tells the step it is of."""

    def __init__(self, side: str, folder: Path, keep: int = KEEP) -> None:
        self.side, self.folder = side, folder
        naming = {"automatic_checkpoint_naming": True, "total_limit": keep} if side == "automatic" else {}
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            project_dir=str(folder),
            project_config=accelerate.utils.ProjectConfiguration(project_dir=str(folder), **naming),
        )
        model = nn.Linear(WIDTH, WIDTH)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.zeros(1, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _constant)
        if side == "ours":
            folder.mkdir(parents=True, exist_ok=True)
            storage.sweep(folder)
            self.model, self.optimizer = model, optimizer
            self.runtime = Runtime(self.accelerator, None)
            self.state = RunState(model, optimizer, Progress(slots=1))
            self.writer = CheckpointWriter(folder, keep)
        else:
            self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, self.schedule)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of model and optimizer; loading puts new ones into the optimizer."""
        optimizer = self.optimizer if self.side == "ours" else self.optimizer.optimizer
        return [*self.model.parameters(), *(t for values in optimizer.state.values() for t in values.values())]

    def fill(self, step: int) -> None:
        """Make everything that of a step."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.fill_(step)
        if self.side == "ours":
            self.state.progress.step = step
        else:
            self.schedule.scheduler.last_epoch = step
        random.seed(step)
        np.random.seed(step)
        torch.manual_seed(step)

    def save(self, step: int) -> None:
        """Save, and return when it is announced as saved."""
        self.fill(step)
        if self.side == "ours":
            files, record = capture(self.state, self.runtime)
            self.writer.save(files, record, [])
            self.writer.wait()
        else:
            self.accelerator.save_state(str(self.folder / "state") if self.side == "same" else None)

    def directories(self) -> list[Path]:
        """Return what there is to load, the newest last."""
        if self.side == "ours":
            return [self.folder / f"step_{step:08d}" for step in list_steps(self.folder)]
        if self.side == "same":
            return [path for path in [self.folder / "state"] if path.exists()]
        saved = self.folder / "checkpoints"
        paths = saved.iterdir() if saved.exists() else []
        return sorted(paths, key=lambda path: int(path.name.split("_")[1]))

    def load(self) -> list[str]:
        """Load the newest as a user would; return what was said to be damaged."""
        if self.side == "ours":
            found, damages = find_newest(self.folder)
            if found is None:
                raise ValueError("; ".join(damages))
            restore(self.state, self.runtime, found.load(), found.record)
            return damages
        if self.side == "same":
            self.accelerator.load_state(str(self.folder / "state"))
        else:
            self.accelerator.load_state()
            self.accelerator.project_configuration.iteration = 1 + int(self.directories()[-1].name.split("_")[1])
        return []

    def loads_by_hand(self) -> bool:
        """Say whether an older directory loads and is whole."""
        for path in reversed(self.directories()[:-1]):
            with contextlib.suppress(Exception):
                self.accelerator.load_state(str(path))
                if len(self.steps()) == 1:
                    return True
        return False

    def steps(self) -> set[float]:
        """Return the steps that the parts are of; one if they are whole. A part of no step at all adds -1."""
        steps = {bound.item() for tensor in self.tensors() for bound in torch.aminmax(tensor)}
        steps.add(self.state.progress.step if self.side == "ours" else self.schedule.scheduler.last_epoch)
        step = max(steps)
        if step == step and 0 < step < 2**31 and step == int(step):
            step = int(step)
            python, numpy = random.getstate(), np.random.get_state()[1]
            same = python == random.Random(step).getstate()
            same &= bool((numpy == np.random.RandomState(step).get_state()[1]).all())
            same &= torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(step).get_state())
            if not same:
                steps.add(-1)
        return steps


def _constant(step: int) -> float:
    return 1.0


def _quiet() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)


# ---- kills while a state is saved all the time -----------------------------------------------------------------------


def save_forever(side: str, folder: str, report: str, announced: str) -> None:
    """Load what the one before left, report it, and save until killed."""
    _quiet()
    saver = Saver(side, Path(folder))
    outcome, step = "nothing to load", 0
    if saver.directories():
        try:
            damages = saver.load()
            found = saver.steps()
            step = int(max(found))
            outcome = "mixed" if len(found) > 1 else "fell back" if damages else "whole"
        except Exception as error:
            by_hand = saver.loads_by_hand()
            outcome = ("older by hand" if by_hand else "nothing left") + f" ({type(error).__name__})"
    Path(report).write_text(json.dumps([outcome, step]))
    if outcome.startswith(("older", "nothing left")):
        return
    with open(announced, "ab", buffering=0) as file:
        while True:
            step += 1
            saver.save(step)
            file.write(f"{step}\n".encode())


def kill_saver(side: str, kills: int, end: float, folder: Path) -> dict[str, int]:
    """Kill a process that saves all the time, again and again; count what the next one finds."""
    counts: Counter[str] = Counter()
    saved, report, announced = folder / "saved", folder / "report.json", folder / "announced"
    pace = 0.1
    while True:
        last = _last_line(announced)
        report.unlink(missing_ok=True)
        child = CONTEXT.Process(target=save_forever, args=(side, str(saved), str(report), str(announced)))
        child.start()
        _wait_until(lambda child=child: (report.exists() and report.stat().st_size > 3) or not child.is_alive())
        outcome, step = json.loads(report.read_text()) if report.exists() else ("nothing left (died)", 0)
        if counts["kills"]:
            counts[outcome] += 1
            if outcome in ("whole", "fell back") and step < last:
                counts["announced and lost"] += 1
        if counts["kills"] == kills or time.monotonic() > end:
            child.kill()
            child.join()
            return dict(counts)
        if outcome not in ("whole", "fell back", "nothing to load"):  # start anew
            child.kill()
            child.join()
            shutil.rmtree(saved)
            announced.unlink(missing_ok=True)
            child = CONTEXT.Process(target=save_forever, args=(side, str(saved), str(report), str(announced)))
            child.start()
            last = 0
        # At least one save of this life is announced; then any instant of the saves that follow.
        start = time.monotonic()
        _wait_until(lambda last=last: _last_line(announced) > last)
        pace = 0.9 * pace + 0.1 * (time.monotonic() - start)
        time.sleep(random.uniform(0, min(3 * pace, 1)))
        child.kill()
        child.join()
        counts["kills"] += 1
        if counts["kills"] % 100 == 0:
            print(f"{side}: {dict(counts)}", file=sys.stderr, flush=True)


def _wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a child of the benchmark hangs")
        time.sleep(0.002)


def _last_line(path: Path) -> int:
    """Return the number in the last whole line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(lines[-1]) if lines else 0


# ---- damage ----------------------------------------------------------------------------------------------------------


def load_damaged(side: str, folder: str, report: str, newest: int) -> None:
    """Load what was damaged and report what came of it. In a process of its own: pickles are opened here."""
    _quiet()
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    saver = Saver(side, Path(folder), keep=100)
    saver.fill(999)
    try:
        damages = saver.load()
    except Exception as error:
        outcome = "by hand" if side == "automatic" and saver.loads_by_hand() else "refused"
        Path(report).write_text(json.dumps([outcome, [type(error).__name__]]))
        return
    steps = saver.steps()
    if steps == {newest}:
        outcome = "no effect"
    elif len(steps) == 1 and damages:
        outcome = "fell back"
    else:
        outcome = "silent"
    Path(report).write_text(json.dumps([outcome, damages]))


def damage(side: str, corruptions: int, end: float, folder: Path) -> dict[str, int]:
    """Damage the newer of two states, again and again; count what loading it gives."""
    child = CONTEXT.Process(target=_save_two, args=(side, str(folder / "saved"), str(folder / "older")))
    child.start()
    child.join()
    assert child.exitcode == 0
    newest = Saver(side, folder / "saved").directories()[-1]
    pristine = shutil.copytree(newest, folder / "pristine" / newest.name)
    counts: Counter[str] = Counter()
    report = folder / "report.json"
    for number in range(corruptions):
        if time.monotonic() > end:
            break
        chance = random.Random(number)
        what = corrupt(newest, folder / "older", chance, KINDS[number % len(KINDS)])
        name = what.split(":")[0]
        report.unlink(missing_ok=True)
        child = CONTEXT.Process(target=load_damaged, args=(side, str(folder / "saved"), str(report), 2))
        child.start()
        child.join(60)
        if child.is_alive():
            child.kill()
            child.join()
        outcome, details = json.loads(report.read_text()) if report.exists() else ("died", [])
        counts["corruptions"] += 1
        counts[outcome] += 1
        if outcome == "silent":
            counts[f"silent in {name}"] += 1
        if outcome == "fell back" and (len(details) == 1 and str(newest) in details[0]):
            counts["named"] += 1
        (newest / name).unlink(missing_ok=True)
        shutil.copy(pristine / name, newest / name)
        if counts["corruptions"] % 100 == 0:
            print(f"{side}: {dict(counts)}", file=sys.stderr, flush=True)
    return dict(counts)


def _save_two(side: str, folder: str, older: str) -> None:
    _quiet()
    saver = Saver(side, Path(folder), keep=100)
    for step in (1, 2):
        saver.save(step)
        if step == 1:
            shutil.copytree(saver.directories()[-1], older)


# ---- kills of real training ------------------------------------------------------------------------------------------


def kill_training(kills: int, end: float, folder: Path) -> dict[str, int]:
    """Kill train/classify.py at random instants until it is finished, then start another one, and compare."""
    settings = ["--max_train_steps", STEPS, "--num_train_epochs", STEPS, "--output_dir", folder, *TRAINING]
    finished = Fleet(folder / "output", "classify", [*settings, "--run_name", "straight"]).wait(600)
    assert finished.codes == [0], finished.output
    wanted = _weights(folder / "straight" / "checkpoints")
    counts: Counter[str] = Counter()
    while counts["kills"] < kills and time.monotonic() < end:
        counts["runs"] += 1
        run = folder / f"killed-{counts['runs']}"
        _kill_until_finished([*settings, "--run_name", run.name], run / "checkpoints", kills, end, counts)
        if _weights(run / "checkpoints") == wanted:
            counts["identical"] += 1
        shutil.rmtree(run)
    return dict(counts)


def _kill_until_finished(arguments: list[object], saved: Path, kills: int, end: float, counts: Counter[str]) -> None:
    while True:
        before = list_steps(saved)[-1:]
        fleet = Fleet(saved.parents[1] / "output", "classify", arguments)
        if counts["kills"] >= kills or time.monotonic() > end:
            finished = fleet.wait(600)
            assert finished.codes == [0], finished.output
            return
        if random.random() < 0.3:  # while it starts, or wherever it is by then
            time.sleep(random.uniform(0, 0.6))
        else:  # while it trains and saves
            _wait_for_another(saved, before, fleet)
            time.sleep(random.uniform(0, 0.25))
        fleet.kill()
        finished = fleet.wait()
        fleet.log.unlink(missing_ok=True)
        if finished.codes == [0]:
            return
        assert finished.codes == [-9], finished.output
        counts["kills"] += 1
        left = {path.name[:5] for path in saved.iterdir()} if saved.exists() else set()
        counts["in a save"] += ".tmp-" in left
        counts["in pruning"] += ".del-" in left
        if "parameters" in finished.output and before:
            counts["restarts"] += 1
            counts["resumed"] += f"from step {before[0]} " in finished.output
        counts["damaged"] += "skipped" in finished.output
        found, damages = find_newest(saved)
        counts["lost"] += bool(damages) or (found.step if found else 0) < (before or [0])[0]
        if counts["kills"] % 100 == 0:
            print(f"training: {dict(counts)}", file=sys.stderr, flush=True)


def _wait_for_another(saved: Path, before: list[int], fleet: Fleet) -> None:
    _wait_until(lambda: list_steps(saved)[-1:] != before or not fleet.ranks[0].is_alive())


def _weights(saved: Path) -> list[bytes]:
    path = saved / f"step_{list_steps(saved)[-1]:08d}"
    return [(path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer", "ema")]


# ---- report ----------------------------------------------------------------------------------------------------------


PAGE = """# What is left after a kill or damage

Written by

    python bench/crash.py {arguments}

on {date} in {minutes:.0f} minutes, {parallel} tasks at a time (the load of the machine was {load:.1f} at the end, other
work included); each column ends when its time is over, hence the numbers. Machine: {machine}.
Versions: {versions}.

## Training, killed at random instants

    train/classify.py {command}

on digits: dropout, shuffling, a schedule, an average of the weights; every step is logged and saved. It is started,
killed with SIGKILL at a random instant (three in ten within the first 0.6 seconds, the others up to 0.25 seconds after
a new checkpoint), and started again until it is finished; then another run begins.

{training}

## Beside `save_state`

One layer with AdamW's moments, a schedule and the generators of Python, NumPy and torch: 20.3 MB, in which every number
tells its step. A process loads the newest state as a user would, and saves the next ones without a pause until it is
killed, at a random instant after its first save was announced. What the next process loads is looked at: every tensor,
the schedule and all generators must be of one step. Automatic naming has `total_limit={keep}`, this project keeps
{keep}. Where nothing loads, the next process starts anew.

{killed}

The same state, saved twice; then one file of the newer one, drawn at random, has a bit flipped, is cut short, deleted,
replaced by that of the older one, appended to, or zeroed in a part (each a sixth), and it is loaded in a process of its
own that had other values before. Afterwards the file is mended.

{damaged}

Loaded without a word, and wrong, by the file that was damaged:

{silent}

A damaged `random_states_0.pkl` is passed over by `load_state` with a line at log level INFO (accelerate 1.15): the run
goes on with other random numbers.

## What else is tested

- `tests/unit/test_storage.py`: ENOSPC and EIO at every call to the operating system in turn, once and for good, with
  short writes; a file system that is really full; a simulated power loss after every call, with six ways in which a
  disk may keep or lose what was not flushed.
- `tests/unit/test_checkpoint.py`: forged checkpoints (pickles renamed, names that point elsewhere, giant and broken
  headers, links, pipes, deep JSON): refused with a message, and nothing is run.
- `tests/process/test_crash.py`: the first table in short, and a disk that fills up while training.

## What is not shown

SIGKILL does not empty the system's file cache, so the kills say nothing of a power loss; the simulation does, as far as
its model of a disk goes. Checksums notice accidents; an attacker can compute them, and is kept from running code, not
from changing weights. Network file systems are not measured.
"""


def write_page(options: argparse.Namespace, results: dict[str, dict[str, int]], seconds: float) -> str:
    """Return the page."""
    training = Counter(results["training"])
    killed = {side: Counter(results[f"kill-{side}"]) for side in SIDES}
    damaged = {side: Counter(results[f"damage-{side}"]) for side in SIDES}

    def begins(counts: Counter[str], text: str) -> int:
        return sum(count for name, count in counts.items() if name.startswith(text))

    def silent(counts: Counter[str]) -> str:
        parts = {name.removeprefix("silent in "): count for name, count in counts.items() if "silent in " in name}
        return ", ".join(f"{name} {count}" for name, count in sorted(parts.items())) or "none"

    return PAGE.format(
        arguments=f"--kills {options.kills} --corruptions {options.corruptions} --minutes {options.minutes:g}",
        parallel=options.parallel,
        load=os.getloadavg()[0],
        date=time.strftime("%Y-%m-%d"),
        minutes=seconds / 60,
        machine=_machine(),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, accelerate {accelerate.__version__}, "
        f"safetensors {safetensors.__version__}",
        command=" ".join(TRAINING[2:]),
        keep=KEEP,
        training=_table(
            ["", ""],
            ["SIGKILLs", training["kills"]],
            ["of them in the midst of writing a checkpoint", training["in a save"]],
            ["of them in the midst of pruning one", training["in pruning"]],
            ["restarts that found a checkpoint and lived to say so", training["restarts"]],
            ["of them resumed from the newest", training["resumed"]],
            ["kills that cost a finished checkpoint or left a damaged one", training["lost"] + training["damaged"]],
            [f"runs of {STEPS} steps", training["runs"]],
            ["of them byte-identical to the run without kills (model, optimizer, average)", training["identical"]],
        ),
        killed=_table(
            ["", *SIDES.values()],
            ["SIGKILLs while it saves all the time", *(killed[side]["kills"] for side in SIDES)],
            ["the newest one loads and is whole", *(killed[side]["whole"] for side in SIDES)],
            ["**loads without a word, but mixes steps**", *(killed[side]["mixed"] for side in SIDES)],
            ["damaged, named, and the one before is loaded", *(killed[side]["fell back"] for side in SIDES)],
            ["error; an older one loads by hand", *(begins(killed[side], "older by hand") for side in SIDES)],
            ["**error, and nothing left that loads**", *(begins(killed[side], "nothing left") for side in SIDES)],
            ["loads, but an announced save is lost", *(killed[side]["announced and lost"] for side in SIDES)],
        ),
        damaged=_table(
            ["", *SIDES.values()],
            ["corruptions", *(damaged[side]["corruptions"] for side in SIDES)],
            ["noticed, named, and the one before is loaded", *(damaged[side]["named"] for side in SIDES)],
            ["error; an older one loads by hand", *(damaged[side]["by hand"] for side in SIDES)],
            ["error, nothing else to load", *(damaged[side]["refused"] for side in SIDES)],
            ["process dies or hangs", *(damaged[side]["died"] for side in SIDES)],
            ["**loaded without a word, and wrong**", *(damaged[side]["silent"] for side in SIDES)],
            ["no effect on what was loaded", *(damaged[side]["no effect"] for side in SIDES)],
        ),
        silent="\n".join(f"- {text}: {silent(damaged[side])}" for side, text in SIDES.items()),
    )


def _table(head: list[str], *rows: list[object]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine() -> str:
    model = next((line for line in open("/proc/cpuinfo") if line.startswith("model name")), ": unknown")  # noqa: SIM115
    return f"{model.split(':')[1].strip()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60, help="for each of seven tasks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--parallel", type=int, default=2, help="tasks at a time")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        folder = Path(tempfile.mkdtemp(prefix="bench-crash-"))
        kind, _, side = options.task.partition("-")
        end = time.monotonic() + 60 * options.minutes
        try:
            if kind == "training":
                result = kill_training(options.kills, end, folder)
            elif kind == "kill":
                result = kill_saver(side, options.kills, end, folder)
            else:
                result = damage(side, options.corruptions, end, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(result))
        return
    start = time.monotonic()
    names = ["training", *(f"{kind}-{side}" for kind in ("kill", "damage") for side in SIDES)]

    def work(name: str) -> dict[str, int]:
        command = [sys.executable, __file__, "--task", name]
        command += ["--kills", str(options.kills), "--corruptions", str(options.corruptions)]
        command += ["--minutes", str(options.minutes)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    with ThreadPoolExecutor(options.parallel) as pool:
        results = dict(zip(names, pool.map(work, names)))
    print(json.dumps(results, indent=1))
    options.out.write_text(write_page(options, results, time.monotonic() - start))


if __name__ == "__main__":
    main()
