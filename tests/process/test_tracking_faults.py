"""Runs end well whatever W&B does: with a trained model, one warning, and soon after their last step."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.process.tracked import assert_same_rows
from tests.wandb_server import KEY
from train.engine import wandb_service, wandb_tracker

ROOT = Path(__file__).parents[2]


def assert_ends_well(tracked, fleet, warnings):
    """Fail unless the run ends with a trained model, so many warnings, and soon after its last line of metrics."""
    finished = fleet.wait(180)
    ended = time.time()
    assert finished.code == 0, finished.output
    assert len([line for line in finished.output.splitlines() if "warning" in line.lower()]) == warnings, (
        finished.output
    )
    assert "Traceback" not in finished.output
    lines = [json.loads(line) for line in (tracked.path / "metrics.jsonl").read_text().splitlines()]
    assert "test/loss" in lines[-1]
    assert list(tracked.rows()) == list(range(1, 9))
    assert ended - lines[-1]["time"] < 50  # the bound of 30 s is one of constants; this machine may be under load
    return finished.output


def test_no_key(tracked, server):
    output = assert_ends_well(
        tracked, tracked.start({"WANDB_BASE_URL": server.url}, "--max_train_steps", 8), warnings=0
    )
    assert "W&B: offline (there is no key); upload later with: python launch/wandb_sync.py" in output
    assert server.requests == []


def test_nobody_at_a_terminal_is_asked(tracked, server):
    """There is no key, and W&B would ask for one."""
    fleet = tracked.start({"WANDB_BASE_URL": server.url}, "--max_train_steps", 8, faults=[("sit_at_terminal",)])
    output = assert_ends_well(tracked, fleet, warnings=0)
    assert "8/8" in output and "W&B: offline (there is no key)" in output


@pytest.mark.parametrize("key", ["short", KEY])
def test_bad_key(tracked, server, key):
    server.fault = "key"
    fleet = tracked.start(server.environment(WANDB_API_KEY=key, WANDB_MODE=None), "--max_train_steps", 8)
    assert "warning: W&B does not answer, or refuses the key (" in assert_ends_well(tracked, fleet, warnings=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gone", "silent", "error"])
def test_service_that_is_down_at_the_start(tracked, server, fault):
    server.fault = fault
    if fault == "gone":
        server.close()
    shorter = ("set_attribute", "train.engine.wandb_tracker", "INIT_TIMEOUT_SECONDS", 5)
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, faults=[shorter])
    assert "warning: W&B does not answer, or refuses the key (" in assert_ends_well(tracked, fleet, warnings=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "error"])
def test_artifact_that_is_not_taken(tracked, server, fault):
    """The service went down in the middle, and W&B asks it for a while before it takes an artifact."""
    server.die_at, server.die_of = "ArtifactType", fault
    names = ("FINISH_TIMEOUT_SECONDS", "ARTIFACT_SECONDS")
    faults = [("set_attribute", "train.engine.wandb_tracker", name, 3) for name in names]
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, "--wandb_artifact", faults=faults)
    assert "warning: wandb failed (not everything was taken" in assert_ends_well(tracked, fleet, warnings=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gone", "silent", "error"])
def test_service_that_goes_down_in_the_middle(tracked, server, fault):
    """What it did not get, all rows, is sent by a later start."""
    server.die_after, server.die_of = 0, fault
    shorter = ("set_attribute", "train.engine.wandb_tracker", "FINISH_TIMEOUT_SECONDS", 5)
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, faults=[shorter])
    assert "warning: wandb failed (Timed out finishing run.)" in assert_ends_well(tracked, fleet, warnings=1)
    assert server.only_run().steps == []
    if fault != "gone":
        server.fault = None
        tracked.run(server.environment(), "--max_train_steps", 10)
        assert_same_rows(server, tracked)


def test_failure_of_the_run_itself_is_not_held_up(tracked, server):
    server.die_after, server.die_of = 0, "silent"
    faults = [
        ("poison_loss", 5, "nan", 1),
        ("set_attribute", "train.engine.wandb_tracker", "FINISH_TIMEOUT_SECONDS", 5),
    ]
    started = time.monotonic()
    finished = tracked.start(server.environment(), "--max_train_steps", 8, faults=faults).wait()
    assert finished.code == 1 and "NaN" in finished.output and "Traceback" not in finished.output, finished.output
    assert time.monotonic() - started < 60


def test_killed_wandb(tracked, server):
    fault = ("signal_wandb", 3, signal.SIGKILL)
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, faults=[fault])
    assert "warning: wandb failed" in assert_ends_well(tracked, fleet, warnings=1)


def test_wandb_that_hangs(tracked, server):
    """Its process is there and does nothing, and would not end when it is told to; Python would wait for it."""
    script = """
        import signal, sys
        from tests.process import faults
        from train import classify
        from train.engine import wandb_service, wandb_tracker

        faults.draw_nothing(0)
        faults.signal_wandb(0, 3, signal.SIGSTOP)
        wandb_tracker.FINISH_TIMEOUT_SECONDS = wandb_service.EXIT_SECONDS = 3
        classify.run()
    """
    arguments = tracked.arguments("--max_train_steps", 8)
    with open(tracked.folder / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "HOME": str(tracked.home), **server.environment()},
            stdout=output,
            stderr=output,
        )
        try:
            assert process.wait(120) == 0
        finally:
            process.kill()
        output.seek(0)
        printed = output.read()
    assert printed.count("warning: wandb failed (not everything was taken in 5 s)") == 1, printed
    assert "Traceback" not in printed
    assert wandb_tracker.FINISH_TIMEOUT_SECONDS + 2 + wandb_service.EXIT_SECONDS < 30
    left = [
        one for one in psutil.process_iter() if one.name() == "wandb-core" and one.status() == psutil.STATUS_STOPPED
    ]
    assert not [one for one in left if one.environ().get("HOME") == str(tracked.home)]


def test_home_that_cannot_be_written(tracked, server):
    fleet = tracked.start(server.environment(HOME="/proc"), "--max_train_steps", 8)
    assert_ends_well(tracked, fleet, warnings=0)
    assert_same_rows(server, tracked)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_full_disk(tracked, server, mode):
    """A small file system in the place of W&B's files."""
    folder = tracked.path / "wandb"
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("a file system has to be mounted by root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this kernel or container mounts nothing: {mounted.stderr}")
    try:
        fleet = tracked.start(server.environment(WANDB_MODE=mode), "--max_train_steps", 8, pictures=True)
        assert_ends_well(tracked, fleet, warnings=1)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
