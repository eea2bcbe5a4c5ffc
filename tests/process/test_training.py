"""What happens inside a run: exact metrics, guards, W&B, and the golden losses."""

import json
import os
from pathlib import Path

import pytest

from tests.process.fleet import Fleet

GOLDEN = Path(__file__).parents[1] / "golden" / "digits.json"


def test_validation_does_not_depend_on_the_processes(classify):
    """269 samples divide by neither 2 nor 3; each counts once."""
    settings = ["--max_train_steps", 1, "--slots", 6, "--batch_size", 66]
    for processes in (1, 2, 3):
        classify.run(f"on{processes}", *settings, processes=processes)
    first, *others = ({**classify.metrics(f"on{processes}")[0]} for processes in (1, 2, 3))
    for other in others:
        assert other["val/accuracy"] == first["val/accuracy"]
        assert other["val/loss"] == pytest.approx(first["val/loss"], abs=1e-6)


def test_accumulation_gives_the_same_gradients(classify):
    """Without dropout, one pass of 64 and eight of 8 are the same step; so are the 43 samples that end the epoch."""
    for micro in (64, 8):
        settings = ["--max_train_steps", 20, "--learning_rate", 1e-5, "--log_every", 1, "--micro_batch_size", micro]
        classify.run(f"micro{micro}", *settings)
    one, other = classify.metrics("micro64")[:20], classify.metrics("micro8")[:20]
    for name in ("train/loss", "train/grad_norm"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in other], rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_nan_stops_the_run_and_never_reaches_the_weights(classify, processes):
    settings = ["--checkpoint_every", 2, "--max_train_steps", 8]
    finished = classify.start("run", *settings, processes=processes, faults=[("poison_loss", 5, "nan", 1)]).wait()
    assert finished.code == 1
    assert "step 5: the loss or a gradient is NaN or infinite (learning rate 0.001)" in finished.output
    assert classify.steps("run") == [2, 4]
    assert "Traceback" not in finished.output
    again = classify.run("run", *settings, processes=processes)
    assert "from step 4" in again.output


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_skipped_step_changes_no_weight(classify, value):
    settings = ["--checkpoint_every", 1, "--keep_checkpoints", 9, "--max_train_steps", 6, "--on_nonfinite", "skip"]
    classify.run("run", *settings, faults=[("poison_loss", 3, value, 1)])
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert classify.file("run", 2, file) == classify.file("run", 3, file)
        assert classify.file("run", 3, file) != classify.file("run", 4, file)
    assert classify.metrics("run")[-2]["train/skipped_steps"] == 1


def test_too_many_skips_in_a_row_end_the_run(classify):
    settings = ["--max_train_steps", 30, "--on_nonfinite", "skip"]
    finished = classify.start("run", *settings, faults=[("poison_loss", 3, "nan", 20)]).wait()
    assert finished.code == 1
    assert "10 in a row" in finished.output


def test_early_stopping_survives_a_restart(classify):
    settings = [
        "--learning_rate",
        "1e-9",
        "--eval_every",
        "2",
        "--early_stopping_patience",
        "3",
        "--checkpoint_every",
        "1",
    ]
    classify.run("straight", *settings)
    classify.start("killed", *settings, faults=[("die_after", 5)]).wait()
    finished = classify.run("killed", *settings)
    assert "early stop" in finished.output
    classify.assert_same("straight", "killed", classify.steps("straight")[-1])
    again = classify.run("killed", *settings)
    assert classify.steps("killed") == classify.steps("straight"), again.output


def test_best_and_latest_are_kept(classify):
    classify.run("run", "--num_train_epochs", 6, "--keep_checkpoints", 1, "--learning_rate", 0.02)
    lines = [line for line in classify.metrics("run") if "val/accuracy" in line]
    best = max(lines, key=lambda line: line["val/accuracy"])["step"]
    assert classify.steps("run") == sorted({best, lines[-1]["step"]})


def test_wandb_offline_without_a_key(classify, tmp_path):
    """One offline run per start, all with the same id, and nobody is asked anything."""
    hidden = {"WANDB_API_KEY": None, "WANDB_MODE": None, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    arguments = ["--output_dir", tmp_path, "--run_name", "run", "--max_train_steps", 2]
    for steps in (2, 4):
        finished = Fleet(
            tmp_path / "output", "classify", [*arguments, "--max_train_steps", steps], environment=hidden
        ).wait()
        assert finished.code == 0, finished.output
        assert "W&B: offline" in finished.output
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    folders = [name for name in os.listdir(tmp_path / "run" / "wandb") if name.startswith("offline-run-")]
    assert len(folders) == 2
    assert all(name.endswith(identity["wandb_id"]) for name in folders)
    assert [start["step"] for start in identity["starts"]] == [0, 2]


def test_golden_losses(classify):
    """The first losses of a small run; a change that moves them must be meant and must show both curves."""
    classify.run("run", "--model", "mnist_cnn", "--max_train_steps", 20, "--log_every", 1)
    losses = [line["train/loss"] for line in classify.metrics("run") if "train/loss" in line]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_by_the_minute(classify, processes):
    settings = ["--num_train_epochs", 20, "--eval_every", "20 epochs", "--keep_checkpoints", 99]
    classify.run("run", *settings, "--checkpoint_every", "0.005 minutes", processes=processes)
    assert len(classify.steps("run")) > 1


def test_time_of_saving_is_a_metric(classify):
    classify.run("run", "--max_train_steps", 6, "--checkpoint_every", 2, "--log_every", 2)
    lines = [json.loads(line) for line in (classify.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if line["step"] == 6)
    assert 0 < last["perf/checkpoint_blocked_seconds"] <= last["perf/checkpoint_seconds"]
