"""Whether a checkpoint brings all of a run back, and what saving costs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from train.engine.checkpoint import open_checkpoint, step_name
from train.engine.checks.finding import Finding, judge, listing, skip
from train.engine.checks.probe import coming_batches, probe_loop
from train.engine.checks.subject import Snapshot, Subject, trial
from train.engine.errors import TrainingError
from train.engine.loop import Loop
from train.engine.randomness import seed_all
from train.engine.run_directory import RunDirectory
from train.engine.settings import Every
from train.engine.state import Progress, capture, restore
from train.engine.storage import remove_tree
from train.engine.tensors import full

HALF = 2  # steps before the checkpoint, and again after it
COSTLY_SHARE, CHEAP_SHARE = 0.1, 0.01  # of the time of a run, spent on saving
COSTLY_SECONDS = 10.0  # of a whole run, below which nobody minds the share


def check_round_trip(subject: Subject) -> Iterator[Finding]:
    """Save and load in the midst of four steps, and compare with four straight ones, bit for bit."""
    run = subject.session.run
    if run is None:
        yield skip("round trip", "a dry run saves nothing")
        return
    folder = run.checkpoints / ".tmp-preflight"  # swept by the next start if this one is killed
    with trial(subject) as snapshot:
        try:
            yield from _round_trip(subject, snapshot, RunDirectory(folder))
        finally:
            if subject.runtime.is_main:
                remove_tree(folder)


def _round_trip(subject: Subject, snapshot: Snapshot, run: RunDirectory) -> Iterator[Finding]:
    runtime, state = subject.runtime, subject.state
    runtime.on_main(lambda: _make_folder(run))
    loop = probe_loop(subject, run)
    loop._warm_up_buckets(next(coming_batches(loop)))
    straight, seconds_a_step = _straight(subject, loop)

    snapshot.restore()
    _steps(loop, HALF)
    loop.saver.reserve()
    runtime.on_main(loop.saver.wait)  # in a long run that memory is ready when the first save comes
    loop.saver.save()
    runtime.on_main(loop.saver.wait)
    path = run.checkpoints / step_name(state.progress.step)
    _wreck(subject)
    start = time.perf_counter()
    problem = ""
    try:
        saved = open_checkpoint(path)
        restore(state, runtime, saved.load(), saved.record)
    except (ValueError, OSError) as error:
        problem = str(error)
    load_seconds = time.perf_counter() - start
    failed = int(runtime.sum(torch.tensor(float(bool(problem)))))
    if failed:
        yield judge(
            "round trip",
            False,
            f"{failed} process(es) cannot load the checkpoint: {problem or 'see the others'}",
            "all load it",
            (
                "machines do not share --output_dir: choose a folder that all of them see",
                "the file system damages files: see the check of the disk, try another --output_dir",
            ),
        )
        return
    _steps(loop, HALF)
    different = _differences(subject, straight, _image(subject))
    unsteady = False
    if different:
        snapshot.restore()
        unsteady = bool(_differences(subject, straight, _straight(subject, loop)[0]))
    size = sum(file.stat().st_size for file in path.iterdir()) if runtime.is_main else 0
    values = loop.saver.values()
    save_seconds = values.get("perf/checkpoint_seconds", 0.0)
    blocked = values.get("perf/checkpoint_blocked_seconds", 0.0)
    yield _judge_equality(subject, straight, different, unsteady, size, save_seconds, load_seconds)
    yield _judge_interval(loop, seconds_a_step, blocked, save_seconds)


def _make_folder(run: RunDirectory) -> None:
    try:
        remove_tree(run.path)
        run.checkpoints.mkdir(parents=True)
        run.metrics.touch()  # flushed together with a checkpoint
    except OSError as error:  # the other processes hear of it this way only
        raise TrainingError(f"cannot write to {run.path}: {error.strerror}") from error


def _steps(loop: Loop, count: int) -> None:
    batches = coming_batches(loop)
    for _ in range(count):
        loop.step(next(batches))
    loop.add_up()
    if not loop.on_cpu:
        torch.accelerator.synchronize()


def _straight(subject: Subject, loop: Loop) -> tuple[dict[str, Any], float]:
    """Take all steps; return what the run is then, and the seconds of one of the later steps."""
    _steps(loop, HALF)
    start = time.perf_counter()
    _steps(loop, HALF)
    seconds = time.perf_counter() - start
    return _image(subject), seconds / HALF


def _image(subject: Subject) -> dict[str, Any]:
    """Return a copy of all that a checkpoint holds: tensors, and plain values, by name."""
    files, record = capture(subject.state, subject.runtime)
    tensors = {
        f"{part} {name}": full(tensor).to("cpu", copy=True)
        for part, named in files.items()
        for name, tensor in named.items()
    }
    return tensors | {f"progress {name}": value for name, value in record["progress"].items()}


def _differences(subject: Subject, one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs on any process."""
    names = sorted(one.keys() | other.keys())
    here = [float(not (name in one and name in other and _equal(one[name], other[name]))) for name in names]
    anywhere = subject.runtime.sum(torch.tensor(here)).tolist()
    return [name for name, count in zip(names, anywhere) if count]


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Bits, not numbers: NaN equals itself, and -0 is not 0.
    return one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)) if one.numel() else True


def _wreck(subject: Subject) -> None:
    """Make sure that nothing of the state survives in memory."""
    state = subject.state
    files, _ = capture(state, subject.runtime)
    with torch.no_grad():
        for part in ("model", "optimizer", "ema"):
            for tensor in files.get(part, {}).values():
                tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    state.optimizer.state.clear()
    state.progress = Progress(state.progress.slots)
    state.window = None
    seed_all(random.randrange(2**31))


def _judge_equality(
    subject: Subject,
    straight: dict[str, Any],
    different: list[str],
    unsteady: bool,
    size: int,
    save_seconds: float,
    load_seconds: float,
) -> Finding:
    steps = f"{HALF} + {HALF} steps"
    said = f"{steps} equal {2 * HALF} in all {len(straight)} values"
    if different:
        said = f"{steps} differ from {2 * HALF} in {len(different)} of {len(straight)} values: {listing(different)}"
    if unsteady:
        said += f"; {2 * HALF} steps differ from {2 * HALF} steps, too"
    hidden = (
        "the model or the loss keeps something outside of its parameters and buffers (a counter, a list, a cache): "
        "use register_buffer"
    )
    kernels = "kernels that add in any order: --deterministic, slower, makes a restart exact"
    causes = (
        hidden,
        "a buffer with persistent=False changes during training: make it persistent",
        "random numbers that no seed reaches: use torch's own generators in forward",
        "restoring leaves something out: see train/engine/state.py",
    )
    # Without deterministic kernels nobody promises bits on a GPU.
    excused = unsteady and subject.runtime.device.type != "cpu" and not subject.settings.deterministic
    return judge(
        "round trip",
        not different,
        f"{said}; {size / 2**20:.2f} MB on disk, {save_seconds:.2f} s to save, {load_seconds:.2f} s to load",
        "equal to the last bit",
        (kernels, *causes) if excused else causes,
        otherwise="warn" if excused else "fail",
        different=different,
        size=size,
        save_seconds=save_seconds,
        load_seconds=load_seconds,
    )


def _judge_interval(loop: Loop, seconds_a_step: float, blocked: float, save_seconds: float) -> Finding:
    every: Every = loop.checkpoint_every
    steps = every.in_steps(loop.steps_per_epoch)
    interval = every.count * 60 if steps is None else steps * seconds_a_step
    # One checkpoint is written at a time: the next one waits for it.
    lost = max(blocked, save_seconds - interval)
    share = lost / (lost + interval)
    total = loop.total_steps * seconds_a_step * lost / interval
    enough = math.ceil(max(blocked * (1 / CHEAP_SHARE - 1), save_seconds) / seconds_a_step)
    return judge(
        "saving",
        share <= COSTLY_SHARE or total <= COSTLY_SECONDS,
        f"every {loop.settings.checkpoint_every} it takes {share:.1%} of the time, {total:.1f} s of the whole run",
        f"at most {COSTLY_SHARE:.0%}, or {COSTLY_SECONDS:.0f} s",
        (f"too often: --checkpoint_every {enough} would take {CHEAP_SHARE:.0%}",),
        otherwise="warn",
        share=share,
        total_seconds=total,
        blocked_seconds=blocked,
        seconds_a_step=seconds_a_step,
        steps_for_one_percent=enough,
    )
