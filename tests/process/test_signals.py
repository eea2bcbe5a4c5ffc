"""Ctrl-C, SIGTERM and SIGUSR1: the step is finished, all is saved, and the run goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--model",
    "mnist_cnn",
    "--batch_size",
    "160",
    "--lr_scheduler",
    "cosine",
    "--log_every",
    "4",
    "--max_train_steps",
    "12",
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stop_and_go_on(classify, number):
    classify.run("straight", *SETTINGS)
    stopped = classify.start("stopped", *SETTINGS, faults=[("signal_after", 5, number)]).wait()
    assert stopped.code == 75
    assert f"stopped by {number.name} after step 5" in stopped.output
    assert "run the same command again" in stopped.output
    assert classify.steps("stopped") == [5]
    classify.run("stopped", *SETTINGS)
    classify.assert_same("straight", "stopped", 12)


# They agree at each step, one step late because nobody waits for it; or at steps 1, 4 and 7, for each third one.
@pytest.mark.parametrize(("most_steps", "last"), [(1, 6), (3, 8)])
def test_one_rank_hears_it_and_all_stop_at_the_same_step(classify, most_steps, last):
    classify.run("straight", *SETTINGS, processes=2)
    faults = [
        ("signal_after", 5, signal.SIGTERM, 1),
        ("set_attribute", "train.engine.preemption", "SECONDS_BETWEEN", 1e9),
        ("set_attribute", "train.engine.preemption", "MOST_STEPS", most_steps),
    ]
    stopped = classify.start("stopped", *SETTINGS, processes=2, faults=faults).wait()
    assert stopped.codes == [75, 75], stopped.output
    assert classify.steps("stopped") == [last]
    classify.run("stopped", *SETTINGS, processes=2)
    classify.assert_same("straight", "stopped", 12)


ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "accelerate_config.yaml"]
START = [sys.executable, "launch/start.py", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"), [(ACCELERATE, signal.SIGTERM), (START, signal.SIGKILL)], ids=["accelerate", "start"]
)
def test_death_of_the_launcher_is_heard(tmp_path, launcher, number):
    """`accelerate launch` forwards no signal, and none forwards SIGKILL; the run hears of its death and saves."""
    command = [
        *launcher, "train/classify.py", "--tracker", "none", "--output_dir", str(tmp_path), "--run_name", "run",
        "--num_train_epochs", "100000", "--log_every", "1",
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    holder = (tmp_path / "run" / "run.lock").read_text()
    worker = int(holder.split()[1])
    launcher.send_signal(number)
    launcher.wait()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    step = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    lines = metrics.read_text().splitlines()
    assert f'"step": {step},' in lines[-1]
    if launcher is ACCELERATE:  # several processes lose their store with their launcher, and may not come to draw
        assert "curves.png" in os.listdir(tmp_path / "run" / "plots")
