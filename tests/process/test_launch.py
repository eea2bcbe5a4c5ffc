"""Each documented way to start, as a user would type it, and what a user meets when the input is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCH = [f"{BIN}/accelerate", "launch"]
WAYS = {
    "python file": [sys.executable, "train/classify.py"],
    "python module": [sys.executable, "-m", "train.classify"],
    "accelerate": [*LAUNCH, "train/classify.py"],
    "accelerate with config": [*LAUNCH, "--config_file", "accelerate_config.yaml", "train/classify.py"],
    "torchrun": [f"{BIN}/torchrun", "--nproc_per_node", "2", "train/classify.py"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_start(tmp_path, way):
    command = [*WAYS[way], "--tracker", "none", "--output_dir", str(tmp_path), "--max_train_steps", "2"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "test/accuracy" in finished.stdout
    processes = 2 if way == "torchrun" else 1
    assert f"{processes} process(es)" in finished.stdout


WRONG = {
    "no such data set": ("--dataset /no/such/folder", "no such file or folder"),
    "batch that does not divide": ("--batch_size 65 --micro_batch_size 16", "the nearest sizes that do: 64 and 80"),
    "unknown flag": ("--bach_size 64", "--batch_size"),
    "unknown metric": ("--best_metric val/f1", "evaluation gives val/loss, val/accuracy"),
    "precision that the device lacks": ("--mixed_precision fp16", "mixed precision fp16 is not to be had on cpu"),
    "model for other samples": ("--dataset blobs --model mnist_cnn", "try --model mlp"),
    "model for text": ("--model simple_lstm", "simple_lstm does not take image samples; try simple_cnn"),
    "unknown augmentation": ("--augment flap", "augmentation 'flap': unknown"),
    "augmentation of a table": ("--dataset wine --augment flip", "changes images, but the samples are table"),
    "checkpoint that is not there": ("--resume latest", "has no checkpoint"),
    "several at once": ("--log_every 0 --learning_rate -1", "--learning_rate -1.0: must be above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(classify, case):
    flags, message = WRONG[case]
    finished = classify.start("run", *flags.split()).wait()
    assert finished.code == 2, finished.output
    assert message in finished.output
    assert "Traceback" not in finished.output
    assert not (classify.folder / "run").exists()


def test_wrong_input_on_two_processes_is_said_once(classify):
    finished = classify.start("run", "--batch_size", 65, processes=2).wait()
    assert finished.code == 2
    assert finished.output.count("--batch_size 65 does not divide") == 1


def test_output_folder_that_cannot_be_written(classify):
    (classify.folder / "file").write_text("")
    finished = classify.start("run", "--output_dir", classify.folder / "file" / "runs").wait()
    assert finished.code == 2
    assert "file is no folder" in finished.output


def test_second_start_on_one_run_is_refused(classify):
    first = classify.start("run", "--num_train_epochs", 100_000)
    first.wait_for("epoch 1.00")
    second = classify.start("run", "--num_train_epochs", 100_000).wait()
    first.kill()
    first.wait()
    assert second.code == 2
    assert "is in use by process" in second.output


def test_changed_settings_need_consent(classify):
    classify.run("run", "--max_train_steps", 2)
    refused = classify.start("run", "--max_train_steps", 4, "--learning_rate", 0.1, "--batch_size", 32).wait()
    assert refused.code == 2
    assert "learning_rate: 0.001 in the checkpoint, 0.1 now" in refused.output
    assert "--allow_changes batch_size learning_rate" in refused.output
    agreed = classify.run(
        "run", "--max_train_steps", 4, "--learning_rate", 0.1, "--batch_size", 32,
        "--allow_changes", "learning_rate", "batch_size",
    )  # fmt: skip
    assert "from step 2" in agreed.output
    assert classify.metrics("run")[-2]["train/learning_rate"] == 0.1


def test_dry_run_writes_nothing(classify):
    finished = classify.run("run", "--dry_run")
    assert "step 1/1" in finished.output
    assert sorted(path.name for path in classify.folder.iterdir()) == ["output"]
