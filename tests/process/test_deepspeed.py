"""Training with DeepSpeed's ZeRO stages: exact after a kill, and with plain processes on one and the same file."""

import importlib.util

import pytest

from tests.process.test_fsdp import DDP, FILES, SETTINGS, SINGLE, die, largest_difference, layout, resumed_from

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install '.[deepspeed]'"
)


def zero(stage, *faults, processes=2):
    return {"processes": processes, "faults": [("use_deepspeed", stage), *faults]}


def test_killed_and_resumed_equals_straight(classify):
    settings = [*SETTINGS, "--slots", 4, "--checkpoint_every", 2, "--max_train_steps", 6]
    straight = classify.run("straight", *settings, **zero(2))
    assert "2 pass(es)" in straight.output
    killed = classify.start("killed", *settings, **die(zero(2), 5)).wait()
    assert -9 in killed.codes, killed.output
    assert 0 < resumed_from(classify.run("killed", *settings, **zero(2))) < 5
    classify.assert_same("straight", "killed", 6)
    assert classify.file("straight", 6, "ema.safetensors") == classify.file("killed", 6, "ema.safetensors")


def test_moving_between_stages_and_one_process_equals_a_still_run(classify):
    settings = [*SETTINGS, "--slots", 4, "--checkpoint_every", 2, "--max_train_steps", 10]
    classify.run("still", *settings, **SINGLE)
    last = 0
    for how, step in ((zero(1), 4), (SINGLE, 7)):
        finished = classify.start("moving", *settings, **die(how, step)).wait()
        assert -9 in finished.codes, finished.output
        assert classify.steps("moving")[-1] > last
        last = classify.steps("moving")[-1]
    assert resumed_from(classify.run("moving", *settings, "--checkpoint_format", "sharded", **zero(2))) == last
    finished = classify.run("moving", *settings, "--max_train_steps", 12, **DDP)
    assert resumed_from(finished) == 10
    classify.run("still", *settings, "--max_train_steps", 12, **SINGLE)

    still, moving = classify.metrics("still"), classify.metrics("moving")
    for name in ("step", "epoch", "train/learning_rate", "train/clip_rate"):
        assert [line.get(name) for line in moving] == [line.get(name) for line in still]
    assert {line.get("train/clip_rate") for line in still} == {1.0, None}
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/ema_loss"):
        values = [line[name] for line in still if name in line]
        assert values and [line[name] for line in moving if name in line] == pytest.approx(values, abs=1e-6)
    for file in FILES:
        one, other = classify.file("still", 12, file), classify.file("moving", 12, file)
        assert layout(one) == layout(other)
        assert largest_difference(one, other) < 1e-5


def test_a_step_that_is_not_finite_is_skipped_as_on_plain_processes(classify):
    poison = ("poison_loss", 2, "nan", 1)
    settings = [*SETTINGS, "--optimizer", "sgd", "--mixed_precision", "bf16", "--on_nonfinite", "skip"]
    settings += ["--checkpoint_every", 3, "--max_train_steps", 3]
    classify.run("plain", *settings, processes=2, faults=[poison])
    finished = classify.run("zero", *settings, **zero(2, poison))
    assert "step 2: the loss or a gradient is NaN" in finished.output and "bf16" in finished.output
    for plain, other in zip(classify.metrics("plain"), classify.metrics("zero")):
        assert other.get("train/skipped_steps") == plain.get("train/skipped_steps")
        assert other.get("train/grad_norm", 0) == pytest.approx(plain.get("train/grad_norm", 0), rel=1e-3)
    for file in FILES:
        assert layout(classify.file("plain", 3, file)) == layout(classify.file("zero", 3, file))
        assert largest_difference(classify.file("plain", 3, file), classify.file("zero", 3, file)) < 1e-4
