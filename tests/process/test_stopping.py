"""Stopped wherever it is: by a file, in an evaluation, in preparation, twice; and processes that are gone or hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# All that an evaluation changes: the best, an average of the weights, the plateau, early stopping.
SETTINGS = [
    "--model", "mlp", "--batch_size", 160, "--num_train_epochs", 2, "--eval_every", 4, "--log_every", 3,
    "--ema_decay", 0.9, "--lr_scheduler", "plateau", "--lr_patience", 0, "--learning_rate", 0.05,
    "--early_stopping_patience", 6, "--checkpoint_every", 1000, "--seed", 3,
]  # fmt: skip
LAST = 16
AT_EACH_STEP = ("set_attribute", "train.engine.preemption", "MOST_STEPS", 1)  # processes agree then
SMALL_BATCHES = ("set_attribute", "train.classify", "EVALUATION_BATCH", 20)  # of validation: 9 on one process, 5 on two


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_stops_the_run(classify, processes):
    file = classify.folder / "stop"
    environment = {"EXACT_TRAINING_STOP_FILE": str(file)}
    classify.run("straight", *SETTINGS, processes=processes)
    faults = [("touch_after", 5, file), AT_EACH_STEP]
    stopped = classify.start("stopped", *SETTINGS, processes=processes, environment=environment, faults=faults).wait()
    assert stopped.code == 75, stopped.output
    assert f"stopped by the file {file}" in stopped.output
    assert stopped.output.count("run the same command again to go on") == 1
    assert classify.steps("stopped")[-1] == 4 + processes  # with two they agree a step later
    file.unlink()
    classify.run("stopped", *SETTINGS, processes=processes, environment=environment)
    classify.assert_same("straight", "stopped", LAST)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs that nobody disturbs, named by their number of processes."""
    from tests.process.conftest import Runs

    script = Runs(tmp_path_factory.mktemp("stopping"), "classify")
    for processes in (1, 2):
        script.run(f"straight_{processes}", *SETTINGS, processes=processes, faults=[SMALL_BATCHES])
    return script


@pytest.mark.parametrize("batches", [1, 12])  # of the weights, and of their average
@pytest.mark.parametrize("step", [4, 8, LAST])
def test_an_interrupted_evaluation_is_repeated(straight, step, batches):
    name = f"evaluation_{step}_{batches}"
    fault = ("signal_in_evaluation", step, signal.SIGTERM, batches)
    stopped = straight.start(name, *SETTINGS, faults=[SMALL_BATCHES, fault]).wait()
    assert stopped.code == 75, stopped.output
    assert f"the evaluation of step {step} was interrupted" in stopped.output
    assert straight.steps(name)[-1] == step
    again = straight.start(name, *SETTINGS, faults=[SMALL_BATCHES, fault]).wait()  # and once more
    assert again.code == 75, again.output
    straight.run(name, *SETTINGS, faults=[SMALL_BATCHES])
    assert straight.metrics(name) == straight.metrics("straight_1")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert straight.file(name, LAST, file) == straight.file("straight_1", LAST, file)


def test_an_interrupted_evaluation_on_two_processes(straight):
    fault = ("signal_in_evaluation", 8, signal.SIGUSR1, 1, 1)
    stopped = straight.start("two", *SETTINGS, processes=2, faults=[SMALL_BATCHES, fault]).wait()
    assert stopped.codes == [75, 75], stopped.output
    assert "the evaluation of step 8 was interrupted" in stopped.output
    straight.run("two", *SETTINGS, processes=2, faults=[SMALL_BATCHES])
    straight.assert_same("straight_2", "two", LAST)


def test_a_second_signal_leaves_at_once(classify):
    run = classify.start("run", *SETTINGS, faults=[("sleep_in_step", 3, 60)])
    run.wait_for("asleep")
    run.signal(signal.SIGTERM)
    time.sleep(1.2)
    run.signal(signal.SIGTERM)
    finished = run.wait(20)
    assert finished.code == 130, finished.output
    assert "Traceback" not in finished.output
    classify.run("run", *SETTINGS)


@pytest.mark.parametrize("warning", ["SIGUSR1", "file"])
def test_the_end_of_the_grace_period_is_no_second_signal(classify, warning):
    file = classify.folder / "stop"
    faults = [("sleep_in_step", 3, 4)] if warning == "SIGUSR1" else [("touch_after", 4, file), ("sleep_in_save", 4)]
    run = classify.start("run", *SETTINGS, faults=faults, environment={"EXACT_TRAINING_STOP_FILE": str(file)})
    run.wait_for("asleep")
    if warning == "SIGUSR1":
        run.signal(signal.SIGUSR1)
    time.sleep(1.2)
    run.signal(signal.SIGTERM)
    finished = run.wait(20)
    assert finished.code == 75, finished.output
    assert classify.steps("run") == [4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_data_is_prepared(classify, number):
    run = classify.start("run", *SETTINGS, faults=[("sleep_in_preparation", 60)])
    run.wait_for("asleep")
    run.signal(number)
    finished = run.wait(20)
    assert finished.code == 75, finished.output
    assert f"stopped by {number.name} outside training: there was nothing to save" in finished.output
    assert not (classify.folder / "run").exists()


def test_a_process_that_hangs_is_named(classify):
    run = classify.start("run", *SETTINGS, "--collective_timeout_seconds", 8, processes=2,
                         faults=[("sleep_in_step", 3, 2)])  # fmt: skip
    run.wait_for("asleep")
    run.signal(signal.SIGSTOP, ranks=[1])
    finished = run.wait(60)
    assert finished.codes[0] == 1, finished.output
    assert "waits for other processes in vain; silent for longest: rank 1 on" in finished.output
    assert "Traceback" not in finished.output


def test_a_process_that_dies_ends_the_others(classify):
    run = classify.start("run", *SETTINGS, processes=2, faults=[("sleep_in_step", 3, 2)])
    run.wait_for("asleep")
    run.signal(signal.SIGKILL, ranks=[0])  # the one that the store lives with
    finished = run.wait(60)
    assert finished.codes == [-9, 1], finished.output
    assert "rank 1 on" in finished.output and "waits for other processes in vain" in finished.output


# ---- launch/start.py -------------------------------------------------------------------------------------------------


def launch(folder, *arguments, options=()):
    """Start two processes by launch/start.py and return it and the file of its output."""
    command = [sys.executable, "launch/start.py", "--nproc-per-node", "2", *options, "train/classify.py"]
    common = ["--tracker", "none", "--output_dir", folder, "--run_name", "run"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    output = open(folder / "output.txt", "a+")  # noqa: SIM115
    arguments = [str(argument) for argument in (*command, *common, *arguments)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output, env=environment), folder / "output.txt"


def wait_for(launcher, log, text):
    end = time.monotonic() + 120
    while text not in log.read_text():
        assert launcher.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_launcher_passes_signals_down_and_the_exit_code_up(tmp_path, number):
    launcher, log = launch(tmp_path, "--model", "mlp", "--num_train_epochs", 100_000)
    wait_for(launcher, log, "epoch 2.00")
    launcher.send_signal(number)
    assert launcher.wait(60) == 75, log.read_text()
    assert f"stopped by {number.name}" in log.read_text()


@pytest.mark.slow
def test_the_launcher_does_not_repeat_bad_input(tmp_path):
    launcher, log = launch(tmp_path, "--batch_size", 65, options=["--max-restarts", "3"])
    assert launcher.wait(120) == 2
    assert log.read_text().count("error: --batch_size 65 does not divide") == 1


@pytest.mark.slow
def test_a_crashed_worker_is_named_and_the_run_goes_on_from_its_checkpoint(classify):
    straight = classify.run("straight", *SETTINGS, "--num_train_epochs", 60, "--checkpoint_every", 8, processes=2)
    assert "resuming" not in straight.output
    settings = [*SETTINGS, "--num_train_epochs", 60, "--checkpoint_every", 8]
    launcher, log = launch(classify.folder, *settings, options=["--max-restarts", "1"])
    wait_for(launcher, log, "epoch 10.00")
    holder = (classify.folder / "run" / "run.lock").read_text()
    os.kill(int(holder.split()[1]), signal.SIGKILL)
    assert launcher.wait(120) == 0, log.read_text()
    assert "resuming" in log.read_text()
    classify.assert_same("straight", "run", max(classify.steps("straight")))
