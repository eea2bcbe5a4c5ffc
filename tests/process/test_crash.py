"""A run that saves all the time is killed at random instants or loses its disk, and ends as if nothing had happened."""

import contextlib
import os
import random
import subprocess
import time

import pytest

from train.engine.checkpoint import find_newest, list_steps

# Dropout, shuffling, a schedule, an average of the weights; 8 steps an epoch, each of them logged and saved.
SETTINGS = [
    "--model",
    "mnist_cnn",
    "--batch_size",
    "160",
    "--ema_decay",
    "0.9",
    "--lr_scheduler",
    "cosine",
    "--log_every",
    "1",
    "--checkpoint_every",
    "1",
    "--keep_checkpoints",
    "2",
]


@pytest.mark.slow
def test_killed_at_random_instants(classify):
    steps, kills = 120, 25
    settings = [*SETTINGS, "--max_train_steps", steps, "--num_train_epochs", steps]
    classify.run("straight", *settings)
    folder = classify.folder / "killed" / "checkpoints"
    resumed = 0
    for number in range(kills):
        before = list_steps(folder)[-1:]
        ranks = classify.start("killed", *settings)
        if number % 2:  # while it starts, or wherever it is by then
            time.sleep(random.uniform(0, 0.6))
        else:  # while it trains and saves
            end = time.monotonic() + 60
            while list_steps(folder)[-1:] == before and ranks.ranks[0].is_alive() and time.monotonic() < end:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.1))
        ranks.kill()
        finished = ranks.wait()
        assert finished.codes in ([-9], [0]), finished.output
        assert "skipped" not in finished.output and "Traceback" not in finished.output, finished.output
        if "parameters" in finished.output and before:
            assert f"from step {before[0]} " in finished.output, finished.output
            resumed += 1
        found, damages = find_newest(folder)
        assert damages == [] and (found is None or [found.step] >= before)
    assert resumed > kills / 4
    classify.run("killed", *settings)
    classify.assert_same("straight", "killed", steps)
    assert not [name for name in os.listdir(folder) if not name.startswith("step_")]


@pytest.mark.parametrize("processes", [1, 2])
def test_disk_that_fills_up_while_training(classify, processes):
    settings = [*SETTINGS, "--max_train_steps", 16]
    classify.run("straight", *settings, processes=processes)
    finished = classify.start("full", *settings, processes=processes, faults=[("fill_disk", 400)]).wait()
    assert finished.code == 1, finished.output
    assert "Traceback" not in finished.output
    assert finished.output.count("error: ") == 1
    assert finished.output.count("No space left on device") == 1
    folder = classify.folder / "full" / "checkpoints"
    found, damages = find_newest(folder)
    assert damages == [] and 1 < found.step < 16
    assert f"the newest one is step_{found.step:08d}. Make room" in finished.output
    again = classify.run("full", *settings, processes=processes)
    assert f"from step {found.step} " in again.output
    classify.assert_same("straight", "full", 16)
    assert not [name for name in os.listdir(folder) if not name.startswith("step_")]


def fill(path):
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_disk_that_is_really_full(classify):
    settings = [*SETTINGS, "--max_train_steps", 16]
    classify.run("straight", *settings)
    run = classify.folder / "full"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", run], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        ranks = classify.start("full", *settings)
        ranks.wait_for("parameters")
        fill(run / "filler")
        finished = ranks.wait()
        assert finished.code == 1, finished.output
        assert "Traceback" not in finished.output, finished.output
        assert finished.output.count("error: ") == 1 and "No space left on device" in finished.output
        found, damages = find_newest(run / "checkpoints")
        assert damages == []
        (run / "filler").unlink()
        again = classify.run("full", *settings)
        assert found is None or f"from step {found.step} " in again.output
        classify.assert_same("straight", "full", 16)
    finally:
        subprocess.run(["umount", "-l", run], check=True)
