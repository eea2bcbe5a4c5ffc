"""A run that was killed and started again is the run that was not, to the last bit."""

import json

import pytest

# Dropout, shuffling, a schedule, an average of the weights; 8 steps an epoch, the last of them with a short batch.
SETTINGS = [
    "--model",
    "mnist_cnn",
    "--batch_size",
    "160",
    "--ema_decay",
    "0.9",
    "--lr_scheduler",
    "cosine",
    "--warmup_steps",
    "3",
    "--log_every",
    "4",
    "--checkpoint_every",
    "3",
]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_every_step(classify, processes):
    steps = 12
    settings = [*SETTINGS, "--max_train_steps", steps]
    classify.run("straight", *settings, processes=processes)
    # Each start dies later than the one before, so that the run gets on and every step is the last of some start.
    for step in range(1, steps + 1):
        faults = [("die_after", step)]
        finished = classify.start("killed", *settings, processes=processes, faults=faults).wait()
        assert -9 in finished.codes, finished.output
    classify.run("killed", *settings, processes=processes)
    classify.assert_same("straight", "killed", steps)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "extra",
    [
        "--micro_batch_size 8",
        "--num_workers 1",
        "--optimizer sgd --lr_scheduler one_cycle",
        "--optimizer muon --weight_decay 0.1 --class_balance weights --label_smoothing 0.1",
        "--mixed_precision bf16",
        "--lr_scheduler plateau --lr_patience 0 --eval_every 2",
        "--slots 4 --max_grad_norm 0.05",
    ],
)
def test_killed_with_other_settings(classify, processes, extra):
    settings = [*SETTINGS, "--max_train_steps", 10, *extra.split()]
    classify.run("straight", *settings, processes=processes)
    classify.start("killed", *settings, processes=processes, faults=[("die_after", 9)]).wait()
    finished = classify.run("killed", *settings, processes=processes)
    assert "from step 8" in finished.output or "from step 6" in finished.output
    classify.assert_same("straight", "killed", 10)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_with_a_loss_scaler(classify, processes):
    """The scale grows, and halves at an overflow; what it is at the kill must be what it is after the restart."""
    settings = [*SETTINGS, "--max_train_steps", 10]
    scaler = [("use_loss_scaler",), ("poison_loss", 3, "inf", 1)]
    classify.run("straight", *settings, processes=processes, faults=scaler)
    classify.start("killed", *settings, processes=processes, faults=[*scaler, ("die_after", 9)]).wait()
    classify.run("killed", *settings, processes=processes, faults=scaler)
    classify.assert_same("straight", "killed", 10)
    states = [json.loads(classify.file(name, 10, "state.json")) for name in ("straight", "killed")]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert states[0]["progress"]["skipped_steps"] == states[1]["progress"]["skipped_steps"] > 0


def test_another_seed_gives_other_weights(classify):
    """The comparison can fail: it sees a difference where there is one."""
    settings = [*SETTINGS, "--max_train_steps", 4]
    classify.run("one", *settings)
    classify.run("other", *settings, "--seed", 1)
    assert classify.file("one", 4) != classify.file("other", 4)


def test_finished_run_only_reports(classify):
    settings = [*SETTINGS, "--max_train_steps", 4]
    first = classify.run("run", *settings)
    metrics = classify.metrics("run")
    again = classify.run("run", *settings)
    score = next(line for line in first.output.splitlines() if line.startswith("test/loss"))
    assert score in again.output
    assert classify.metrics("run") == metrics


def test_longer_training_goes_on(classify):
    settings = [*SETTINGS, "--lr_scheduler", "constant"]
    classify.run("run", *settings, "--max_train_steps", 4)
    finished = classify.run("run", *settings, "--max_train_steps", 8)
    assert "from step 4" in finished.output
    assert "changed max_train_steps: 4 in the checkpoint, 8 now" in finished.output
    assert classify.steps("run")[-1] == 8
