"""The number of processes may change at each restart."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

SETTINGS = [
    "--model",
    "mnist_cnn",
    "--batch_size",
    "160",
    "--slots",
    "8",
    "--lr_scheduler",
    "cosine",
    "--warmup_steps",
    "3",
    "--log_every",
    "3",
    "--checkpoint_every",
    "3",
    "--max_train_steps",
    "12",
]


def losses(classify, name):
    return [line["train/loss"] for line in classify.metrics(name) if "train/loss" in line]


def largest_difference(classify, one, other):
    a, b = (load(classify.file(name, 12)) for name in (one, other))
    return max(abs(a[name] - b[name]).max() for name in a)


@pytest.fixture
def moving(classify):
    """Run 1 -> 2 -> 4 -> 1 processes, killed between."""

    def run(name, settings):
        for processes, step in ((1, 4), (2, 7), (4, 10)):
            classify.start(name, *settings, processes=processes, faults=[("die_after", step)]).wait()
        return classify.run(name, *settings, processes=1)

    return run


def test_moving_run_equals_a_still_one(classify, moving):
    classify.run("still", *SETTINGS)
    finished = moving("moving", SETTINGS)
    # 9 may not be on the disk yet when the run is killed after step 10; 8 is the end of an epoch.
    assert any(f"from step {step} " in finished.output for step in (9, 8, 6))
    assert losses(classify, "moving") == pytest.approx(losses(classify, "still"), abs=1e-6)
    assert largest_difference(classify, "still", "moving") < 1e-5
    assert [line["step"] for line in classify.metrics("moving")] == [line["step"] for line in classify.metrics("still")]


def test_exact_reduction_gives_the_same_bits_on_any_number_of_processes(classify, moving):
    settings = [*SETTINGS, "--reduction", "exact"]
    weights = set()
    for processes in (1, 2, 4, 8):
        classify.run(f"on{processes}", *settings, processes=processes)
        weights.add(classify.file(f"on{processes}", 12))
    moving("moving", settings)
    weights.add(classify.file("moving", 12))
    assert len(weights) == 1


def test_batch_norm_does_not_depend_on_the_processes(classify):
    """Its averages are buffers, which DistributedDataParallel would take from whoever comes first."""
    data = classify.folder / "images"
    noise = np.random.default_rng(0)
    for number in range(60):
        folder = data / "train" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    settings = ["--dataset", data, "--model", "fast_cnn", "--batch_size", 24, "--slots", 4, "--max_train_steps", 5]
    for processes in (1, 2, 4):
        classify.run(f"on{processes}", *settings, "--reduction", "exact", processes=processes)
    files = [classify.file(f"on{processes}", 5) for processes in (1, 2, 4)]
    assert files[0] == files[1] == files[2]
    assert abs(load(files[0])["features.2.running_mean"]).max() > 0


def test_three_processes_are_exact_too(classify):
    """DistributedDataParallel's regrouped buckets must not show."""
    settings = [*SETTINGS, "--slots", "3", "--batch_size", "150"]
    classify.run("straight", *settings, processes=3)
    classify.start("killed", *settings, processes=3, faults=[("die_after", 8)]).wait()
    classify.run("killed", *settings, processes=3)
    classify.assert_same("straight", "killed", 12)


def test_processes_that_do_not_divide_the_slots_need_consent(classify):
    settings = [*SETTINGS, "--slots", "2", "--batch_size", "150"]
    classify.start("run", *settings, faults=[("die_after", 8)]).wait()
    settings = [setting for setting in settings if setting not in ("--slots", "2", "8")]
    refused = classify.start("run", *settings, processes=3).wait()
    assert refused.code == 2
    assert "dropout masks would differ" in refused.output
    assert "--allow_changes slots" in refused.output
    classify.run("run", *settings, "--allow_changes", "slots", processes=3)
    state = json.loads(classify.file("run", 12, "state.json"))
    assert state["progress"]["slots"] == 3


def test_sharded_checkpoints_resume_on_any_number_of_processes(classify):
    settings = [*SETTINGS, "--ema_decay", "0.9"]
    classify.run("whole", *settings, processes=2)
    sharded = [*settings, "--checkpoint_format", "sharded"]
    for processes, step in ((2, 4), (4, 7), (2, 10)):
        classify.start("sharded", *sharded, processes=processes, faults=[("die_after", step)]).wait()
    finished = classify.run("sharded", *sharded, processes=2)
    assert "resuming" in finished.output
    files = {path.name for path in (classify.folder / "sharded" / "checkpoints" / "step_00000012").iterdir()}
    assert {f"model.shard_0000{rank}_of_00002.safetensors" for rank in (0, 1)} <= files
    assert "model.safetensors" not in files
    # Back to one file, on one process: the run is over, so it only loads; one more step shows that all is there.
    classify.run("sharded", *settings, "--max_train_steps", 13, "--lr_scheduler", "cosine")
    classify.run("whole", *settings, "--max_train_steps", 13, "--lr_scheduler", "cosine")
    one, other = (load(classify.file(name, 13)) for name in ("whole", "sharded"))
    assert max(abs(one[name] - other[name]).max() for name in one) < 1e-5


def test_same_processes_sharded_and_whole_have_the_same_bits(classify):
    short = [*SETTINGS, "--max_train_steps", "4"]
    classify.run("whole", *short, processes=2)
    for steps in (3, 4):
        classify.run("sharded", *short, "--max_train_steps", steps, "--checkpoint_format", "sharded", processes=2)
    classify.run("sharded", *short, "--max_train_steps", 5, processes=2)
    classify.run("whole", *short, "--max_train_steps", 5, processes=2)
    assert classify.file("whole", 5) == classify.file("sharded", 5)
