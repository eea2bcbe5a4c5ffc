"""The stateful LSTM in real processes: killed or stopped and restarted the same run, one process only, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from tests.process.conftest import Runs
from train.engine.checkpoint import find_newest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SAMPLES, HIDDEN, EPOCHS = 60, 8, 3
# All that remembers. By window: updates of an epoch, of which the last is short with windows of 7, and settings.
UPDATES = {1: 60, 7: 9}
CASES = {
    1: ["--lr_scheduler", "one_cycle", "--log_every", 10, "--eval_every", 20, "--checkpoint_every", 13],
    7: ["--lr_scheduler", "plateau", "--lr_patience", 0, "--learning_rate", 0.05, "--log_every", 4,
        "--eval_every", 3, "--checkpoint_every", 5],
}  # fmt: skip
# In the midst of the second epoch, where nothing is due.
MIDST = {1: 83, 7: 13}
KILLS = [(1, MIDST[1]), (1, 120), (7, 19), (7, 15)]  # and at an epoch's end, right after one, at a checkpoint
STOPS = [(1, signal.SIGINT), (7, signal.SIGTERM), (1, signal.SIGUSR1)]
FILES = ("model", "optimizer", "carried", "rng")


def write_samples(path, seed=0, samples=SAMPLES):
    """Write noise, a choice of two waves, and the wave that is chosen."""
    noise = np.random.default_rng(seed)
    time = np.arange(samples)
    chosen = (time >= samples // 2).astype(float)
    target = np.where(chosen, np.sin(time / 3), np.sin(time / 9))
    np.save(path, np.column_stack([target + noise.normal(0, 0.2, samples), 1 - chosen, chosen, target]))
    return path


def needs(engine):
    if engine == "fused":
        pytest.importorskip("numba", reason="numba is not installed: the compiled engine is not to be had")


def errors(finished):
    """Return the messages of a run that ended with one."""
    assert "Traceback" not in finished.output, finished.output
    return [line for line in finished.output.splitlines() if line.startswith("error:")]


def written(script):
    """Return what is in the folder of the runs, but for the output of the tests."""
    return [path.name for path in script.folder.iterdir() if path.name != "output" and path.suffix not in (".npy",)]


def history(script, name):
    return json.loads((script.folder / name / "training_history.json").read_text())["epochs"]


def progress(script, name, step):
    """Return where a run is at a checkpoint, without what depends on the clock."""
    found = json.loads(script.file(name, step, "state.json"))["progress"]
    return {key: value for key, value in found.items() if key not in ("train_seconds", "metrics_bytes")}


def assert_all_same(script, one, other, step):
    script.assert_same(one, other, step)
    for file in FILES:
        file = f"{file}.safetensors"
        assert script.file(one, step, file) == script.file(other, step, file), file
    assert progress(script, one, step) == progress(script, other, step)
    losses = [[{**epoch, "seconds": 0} for epoch in history(script, name)] for name in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == EPOCHS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags that name three files of samples."""
    folder = tmp_path_factory.mktemp("samples")
    paths = {name: write_samples(folder / f"{name}.npy", seed) for seed, name in enumerate(("train", "val", "test"))}
    return ["--data", paths["train"], "--validation_data", paths["val"], "--test_data", paths["test"]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    """Returns the folder of the runs, the name of one that nobody disturbs, made once, and its settings."""
    script = Runs(tmp_path_factory.mktemp("stateful"), "stateful_lstm")
    done = {}

    def give(engine, window):
        needs(engine)
        name = f"{engine}-{window}"
        settings = [*data, "--hidden_size", HIDDEN, "--num_train_epochs", EPOCHS, "--engine", engine]
        settings += ["--window", window, *CASES[window]]
        if name not in done:
            done[name] = script.run(name, *settings, pictures=True)
        return script, name, settings

    give.output = done
    return give


on_engines = pytest.mark.parametrize("engine", ["eager", "fused"])
on_windows = pytest.mark.parametrize("window", [1, 7])


# ---- stopped or killed, and run again --------------------------------------------------------------------------------


@on_engines
@pytest.mark.parametrize(("window", "update"), KILLS)
def test_killed_run_equals_a_straight_one(straight, engine, window, update):
    script, name, settings = straight(engine, window)
    killed = f"{name}-killed-{update}"
    finished = script.start(killed, *settings, faults=[("signal_stateful", update, signal.SIGKILL)]).wait()
    assert finished.codes == [-9], finished.output
    assert 0 < script.steps(killed)[-1] < update
    finished = script.run(killed, *settings)
    assert f"resuming {script.folder / killed} from step" in finished.output
    assert_all_same(script, name, killed, EPOCHS * UPDATES[window])
    rates = {line["train/learning_rate"] for line in script.metrics(killed) if "train/learning_rate" in line}
    assert len(rates) > 2  # the schedule has acted


@on_engines
@pytest.mark.parametrize(("window", "number"), STOPS)
def test_stopped_run_saves_at_that_update_and_goes_on(straight, engine, window, number):
    script, name, settings = straight(engine, window)
    stopped, update = f"{name}-{number.name}", MIDST[window]
    finished = script.start(stopped, *settings, faults=[("signal_stateful", update, number)]).wait()
    samples = SAMPLES + (update - UPDATES[window]) * window
    assert finished.code == 75, finished.output
    assert f"stopped by {number.name} after sample {samples:,}" in finished.output
    assert f"saved at update {update}; run the same command again to go on" in finished.output
    assert script.steps(stopped)[-1] == update

    where = progress(script, stopped, update)
    assert (where["step"], where["epoch"], where["sample"], where["samples_seen"]) == (
        update, 1, samples - SAMPLES, samples,
    )  # fmt: skip
    carried = load(script.file(stopped, update, "carried.safetensors"))
    window_sums = load(script.file(stopped, update, "rng.safetensors"))["process_00000/window"]
    assert carried["hidden"].shape == carried["cell"].shape == (1, 1, HIDDEN)
    assert carried["hidden"].abs().max() > 0 and carried["cell"].abs().max() > 0
    assert carried["epoch"][1] + window_sums[1] == samples - SAMPLES  # the samples of this epoch so far
    assert [epoch["epoch"] for epoch in history(script, stopped)] == [1]

    assert f"from step {update} " in script.run(stopped, *settings).output
    assert_all_same(script, name, stopped, EPOCHS * UPDATES[window])


def test_stopped_and_killed_again_and_again_equals_a_straight_run(straight):
    script, name, settings = straight("eager", 7)
    for update, number in ((2, signal.SIGTERM), (3, signal.SIGINT), (9, signal.SIGKILL), (9, signal.SIGTERM),
                           (14, signal.SIGKILL), (26, signal.SIGTERM)):  # fmt: skip
        finished = script.start("often", *settings, faults=[("signal_stateful", update, number)]).wait()
        assert finished.code == (-9 if number == signal.SIGKILL else 75), finished.output
    script.run("often", *settings)
    assert_all_same(script, name, "often", EPOCHS * UPDATES[7])


def test_signal_from_outside_in_the_midst_of_a_stretch(stateful, data):
    settings = [*data[:2], "--engine", "eager", "--hidden_size", HIDDEN, "--num_train_epochs", 20]
    ranks = stateful.start("run", *settings)
    ranks.wait_for("epoch 2.00")
    ranks.signal(signal.SIGTERM)
    stopped = ranks.wait()
    assert stopped.code == 75, stopped.output
    step = stateful.steps("run")[-1]
    assert f"saved at update {step};" in stopped.output and 2 * SAMPLES <= step < 20 * SAMPLES
    for name in ("run", "straight"):
        stateful.run(name, *settings)
    stateful.assert_same("run", "straight", 20 * SAMPLES)
    carried = [stateful.file(name, 20 * SAMPLES, "carried.safetensors") for name in ("run", "straight")]
    assert carried[0] == carried[1]


def test_another_seed_gives_other_weights(straight):
    """The comparison can fail: it sees a difference where there is one."""
    script, name, settings = straight("eager", 7)
    script.run("seed", *settings, "--seed", 1)
    with pytest.raises(AssertionError):
        assert_all_same(script, name, "seed", EPOCHS * UPDATES[7])


@pytest.mark.parametrize(("before", "after"), [("fused", "eager"), ("eager", "fused")])
def test_engine_may_change_when_a_run_goes_on_and_that_is_said(straight, before, after):
    script, name, settings = straight(before, 1)
    needs(after)
    changed = f"{before}-to-{after}"
    script.start(changed, *settings, faults=[("signal_stateful", 83, signal.SIGTERM)]).wait()
    finished = script.run(changed, *settings, "--engine", after)
    assert f"changed engine: {before} in the checkpoint, {after} now" in finished.output
    found, expected = (load(script.file(run, EPOCHS * SAMPLES)) for run in (changed, name))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


def test_auto_takes_an_engine_and_says_which(stateful, data):
    output = stateful.run("run", *data[:2], "--max_train_steps", 3).output
    (line,) = (line for line in output.splitlines() if line.startswith("engine:"))
    try:
        import numba  # noqa: F401
    except ImportError:
        assert "eager, since the fused one is not to be had here" in line and "numba" in line
    else:
        assert line.startswith("engine: fused (one compiled kernel; ")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_changed_settings_and_data_are_refused(stateful, tmp_path):
    path = write_samples(tmp_path / "rows.npy")
    settings = ["--data", path, "--hidden_size", HIDDEN, "--engine", "eager"]
    stateful.run("run", *settings, "--max_train_steps", 5)
    before = stateful.file("run", 5), stateful.metrics("run")
    more = [*settings, "--max_train_steps", 10]
    for change, said in (
        (["--window", 7], "window: 1 in the checkpoint, 7 now"),
        (["--hidden_size", 9], "hidden_size: 8 in the checkpoint, 9 now"),
        (["--max_grad_norm", 0], "max_grad_norm: 1.0 in the checkpoint, 0.0 now"),
    ):
        finished = stateful.start("run", *more, *change).wait()
        assert finished.code == 2 and said in finished.output, finished.output
        assert len(errors(finished)) == 1
    write_samples(path, seed=7)
    finished = stateful.start("run", *more).wait()
    assert finished.code == 2 and "  data: " in finished.output, finished.output
    assert (stateful.file("run", 5), stateful.metrics("run")) == before
    write_samples(path)
    assert "from step 5 " in stateful.run("run", *more).output


def test_divergence_ends_with_one_message_and_checkpoints_stay(stateful, data):
    settings = [*data[:2], "--hidden_size", HIDDEN, "--checkpoint_every", 10]
    stateful.run("run", *settings, "--max_train_steps", 30)
    before = {step: stateful.file("run", step) for step in stateful.steps("run")}
    wild = ["--learning_rate", 1e30, "--allow_changes", "learning_rate", "--max_train_steps", 200]
    finished = stateful.start("run", *settings, *wild).wait()
    assert finished.code == 1, finished.output
    (message,) = errors(finished)
    assert "update 32, from row 31 of the data on" in message and "learning rate 1e+30" in message
    assert {step: stateful.file("run", step) for step in stateful.steps("run")} == before
    found, damages = find_newest(stateful.folder / "run" / "checkpoints")
    assert (found.step, damages) == (30, [])
    stateful.run("run", *settings, "--max_train_steps", 40)


def spoil_row(path):
    rows = np.load(write_samples(path))
    rows[47, 1] = np.nan
    np.save(path, rows)


def narrow(path):
    np.save(path, np.load(write_samples(path))[:, 1:])


@pytest.mark.parametrize(
    ("flag", "spoil", "said"),
    [
        ("--data", spoil_row, "row 47, column 1: nan"),
        ("--validation_data", narrow, "2 input columns"),
        ("--test_data", None, "there is no such file"),
    ],
)
def test_bad_data_is_refused_and_nothing_written(stateful, data, flag, spoil, said):
    path = stateful.folder / "bad.npy"
    if spoil is not None:
        spoil(path)
    finished = stateful.start("run", *data, flag, path).wait()
    assert finished.code == 2, finished.output
    (message,) = errors(finished)
    assert said in message and str(path) in message
    assert written(stateful) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--window 0", "--window 0: must be 1 or more"),
        ("--test_data rows.npy", "given beside --data"),
        ("--engine cuda", "--engine"),
        ("--resume latest", "has no checkpoint"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_written(stateful, flags, said):
    finished = stateful.start("run", *flags.split()).wait()
    assert finished.code == 2 and said in finished.output, finished.output
    assert "Traceback" not in finished.output and written(stateful) == []


# ---- one process -----------------------------------------------------------------------------------------------------


def test_two_processes_of_torchrun_are_refused_with_one_line(stateful, data):
    finished = stateful.start("run", *data, processes=2).wait()
    assert finished.codes == [2, 2], finished.output
    (line,) = finished.output.splitlines()
    assert "started 2 processes" in line and "run python train/stateful_lstm.py" in line
    assert written(stateful) == []


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_several_tasks_are_refused_with_one_line(stateful, data, variables):
    finished = stateful.start("run", *data, environment=variables).wait()
    assert finished.code == 2, finished.output
    (line,) = finished.output.splitlines()
    assert "one process by design" in line and "--ntasks=1" in line
    assert written(stateful) == []


def test_one_task_of_several_runs(stateful, data):
    variables = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}
    stateful.run("run", *data, "--engine", "eager", "--max_train_steps", 2, environment=variables)


def launch(command, folder, *arguments):
    """Run a command as a user would type it; return its exit code and the lines of ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = [*command, "--tracker", "none", "--output_dir", str(folder), *map(str, arguments)]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180
    )
    return finished.returncode, finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [f"{BIN}/accelerate", "launch", "--num_processes", "2"],
        [f"{BIN}/accelerate", "launch", "--cpu", "--num_processes", "2"],
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    ],
    ids=["accelerate", "accelerate on CPUs", "torchrun"],
)
def test_launchers_of_two_processes_are_refused(tmp_path, data, launcher):
    code, output = launch([*launcher, "train/stateful_lstm.py"], tmp_path / "runs", *data)
    assert code != 0, output
    (line,) = (line for line in output.splitlines() if "error: " in line and "one process by design" in line)
    assert "run python train/stateful_lstm.py" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], [f"{BIN}/accelerate", "launch", "--num_processes", "1"]])
def test_ways_to_start(tmp_path, data, launcher):
    command = [*launcher, "train/stateful_lstm.py", "--max_train_steps", "3"]
    code, output = launch(command, tmp_path / "runs", *data)
    assert code == 0, output
    assert "test/loss" in output and "Warning" not in output


# ---- what a run leaves -----------------------------------------------------------------------------------------------


@on_engines
@on_windows
def test_history_pictures_and_scores_are_there(straight, data, engine, window):
    script, name, _ = straight(engine, window)
    run = script.folder / name
    epochs = history(script, name)
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert all(epoch["seconds"] > 0 for epoch in epochs)
    for picture in ("curves.png", "answers.png"):
        assert (run / "plots" / picture).read_bytes()[:4] == b"\x89PNG"

    lines = script.metrics(name)
    state = {f"state/{part}_{what}" for part in ("hidden", "cell") for what in ("mean", "std", "max", "saturation")}
    assert all(state <= line.keys() for line in lines[:-1])
    rows = np.load(data[5]).astype(np.float32)  # of the test split
    best = json.loads(script.file(name, EPOCHS * UPDATES[window], "state.json"))["progress"]["best_step"]
    weights = load(script.file(name, best))
    hidden = memory = torch.zeros(1, HIDDEN)
    cell = torch.nn.LSTMCell(3, HIDDEN)
    cell.load_state_dict({key[5:-3]: value for key, value in weights.items() if key.startswith("lstm.")})
    squares = []
    with torch.no_grad():
        for row in torch.tensor(rows):
            hidden, memory = cell(row[None, :-1], (hidden, memory))
            answer = hidden[0] @ weights["head.weight"][0] + weights["head.bias"][0]
            squares.append(float(answer - row[-1]) ** 2)
    test = lines[-1]
    assert test["test/loss"] == pytest.approx(np.mean(squares), rel=1e-5)
    assert test["test/loss/column_1"] == pytest.approx(np.mean(squares[: SAMPLES // 2]), rel=1e-5)
    assert test["test/loss/column_2"] == pytest.approx(np.mean(squares[SAMPLES // 2 :]), rel=1e-5)
    assert f"weights of step {best}, best val/loss" in straight.output[name].output


@on_windows
def test_engines_agree(straight, window):
    script, one, _ = straight("eager", window)
    _, other, _ = straight("fused", window)
    for line, line_other in zip(script.metrics(one), script.metrics(other), strict=True):
        assert line == pytest.approx(line_other, rel=1e-2, abs=1e-3)


def test_finished_run_only_reports_and_longer_training_goes_on(straight):
    script, name, settings = straight("eager", 7)
    metrics, seconds = script.metrics(name), history(script, name)
    assert "test/loss" in script.run(name, *settings).output
    assert (script.metrics(name), history(script, name)) == (metrics, seconds)

    script.run("longer", *settings, "--num_train_epochs", 2)
    finished = script.run("longer", *settings)
    assert "changed num_train_epochs: 2 in the checkpoint, 3 now" in finished.output
    assert script.file("longer", 27) == script.file(name, 27)


def test_only_training_data(stateful, data):
    finished = stateful.run("run", *data[:2], "--num_train_epochs", 1, "--log_every", 50, pictures=True)
    lines = stateful.metrics("run")
    assert [line["step"] for line in lines] == [50, 60]
    assert not [key for line in lines for key in line if key.startswith(("val/", "test/"))]
    assert "test/loss" not in finished.output
    run = stateful.folder / "run"
    assert (run / "plots" / "curves.png").exists() and not (run / "plots" / "answers.png").exists()
    assert math.isclose(history(stateful, "run")[0]["loss"], lines[-1]["train/epoch_loss"])


def test_sinusoids_are_made_where_no_data_is_named(stateful):
    finished = stateful.run("run", "--max_train_steps", 3, "--engine", "eager")
    assert "40,000 train + 40,000 validation + 40,000 test samples in order" in finished.output
    last = stateful.metrics("run")[-1]
    assert {f"test/loss/{frequency}_Hz" for frequency in (1, 3, 5, 7)} < last.keys()
    assert last["test/loss"] == pytest.approx(np.mean([last[f"test/loss/{wave}_Hz"] for wave in (1, 3, 5, 7)]))


def test_dry_run_writes_nothing(stateful, data):
    stateful.run("run", *data, "--dry_run")
    assert written(stateful) == []


@pytest.mark.slow
@on_engines
def test_resume_is_verified(tmp_path, data, engine):
    needs(engine)
    command = [sys.executable, "train/stateful_lstm.py", "--verify_resume", "--engine", engine, "--window", "7"]
    code, output = launch(command, tmp_path / "runs", *data)
    assert code == 0, output
    assert "restarted: equal to the last bit" in output and "carried: 3 tensors compared" in output
    assert not (tmp_path / "runs").exists()


def test_help_leaves_torch_alone():
    code = """
import json, sys
import train.stateful_lstm
sys.argv = ["stateful_lstm.py", "--help"]
try:
    train.stateful_lstm.run()
except SystemExit as end:
    print(json.dumps([end.code, sorted({"torch", "numpy", "numba", "accelerate"} & set(sys.modules))]))
"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--window" in printed and "carries its state" in printed
    assert json.loads(printed.splitlines()[-1]) == [0, []]


@pytest.mark.slow
def test_the_kernel_has_the_same_bits_just_compiled_and_from_the_cache(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    settings = ["--engine", "fused", "--max_train_steps", "200", "--tracker", "none", "--output_dir", str(tmp_path)]
    weights = []
    for name in ("compiled", "loaded"):
        command = [sys.executable, "train/stateful_lstm.py", *settings, "--run_name", name]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
        (checkpoint,) = (tmp_path / name / "checkpoints").glob("step_00000200")
        weights.append((checkpoint / "model.safetensors").read_bytes())
        assert list((tmp_path / "cache").rglob("*.nbc"))
    assert weights[0] == weights[1]
