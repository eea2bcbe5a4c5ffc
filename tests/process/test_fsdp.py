"""Sharded training with FSDP2: exact after a kill, and with DDP and single processes on one and the same file."""

import json
import re

import pytest
from safetensors.numpy import load

# Clipping at every step, an average of the weights that is evaluated between two saves, dropout, a schedule.
SETTINGS = [
    "--model",
    "mnist_cnn",
    "--batch_size",
    "160",
    "--slots",
    "2",
    "--max_grad_norm",
    "0.05",
    "--ema_decay",
    "0.9",
    "--lr_scheduler",
    "cosine",
    "--warmup_steps",
    "3",
    "--log_every",
    "1",
    "--eval_every",
    "3",
    "--best_mode",
    "min",
]
FSDP2 = {"processes": 2, "faults": [("use_fsdp2",)]}
FSDP2_BY_LAYER = {"processes": 2, "faults": [("use_fsdp2", "Conv2d", "Linear")]}
DDP = {"processes": 2}
SINGLE = {"processes": 1}
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")


def die(how, step):
    """Add a kill after a step to how a run is started."""
    return {**how, "faults": [*how.get("faults", []), ("die_after", step)]}


def layout(data):
    """Return names, types and shapes of the tensors in a file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def largest_difference(one, other):
    one, other = load(one), load(other)
    assert one.keys() == other.keys()
    return max(abs(one[name] - other[name]).max() for name in one)


def resumed_from(finished):
    """Return the step at which a start went on."""
    return int(re.search(r"resuming .* from step (\d+)", finished.output)[1])


def test_killed_and_resumed_equals_straight(classify):
    settings = [*SETTINGS, "--checkpoint_every", 2, "--max_train_steps", 6]
    straight = classify.run("straight", *settings, **FSDP2)
    assert "parameters: DTensor" in straight.output
    killed = classify.start("killed", *settings, **die(FSDP2, 5)).wait()
    assert -9 in killed.codes, killed.output
    assert 0 < resumed_from(classify.run("killed", *settings, **FSDP2)) < 5
    classify.assert_same("straight", "killed", 6)
    assert classify.file("straight", 6, "ema.safetensors") == classify.file("killed", 6, "ema.safetensors")


def test_moving_between_ddp_fsdp2_and_one_process_equals_a_still_run(classify):
    settings = [*SETTINGS, "--checkpoint_every", 2, "--max_train_steps", 12]
    classify.run("still", *settings, **SINGLE)
    # A save waits for the one before, so at its death each start has saved once at least.
    last = 0
    for how, step, extra in ((DDP, 4, []), (FSDP2, 7, ["--checkpoint_format", "sharded"]), (SINGLE, 11, [])):
        finished = classify.start("moving", *settings, *extra, **die(how, step)).wait()
        assert -9 in finished.codes, finished.output
        if how is not DDP:
            assert resumed_from(finished) > last
            last = resumed_from(finished)
    assert resumed_from(classify.run("moving", *settings, **FSDP2)) > last

    still, moving = classify.metrics("still"), classify.metrics("moving")
    for name in ("step", "epoch", "train/learning_rate", "train/clip_rate"):
        assert [line.get(name) for line in moving] == [line.get(name) for line in still]
    assert {line.get("train/clip_rate") for line in still} == {1.0, None}
    for name in ("train/loss", "val/loss", "val/ema_loss"):
        values = [line[name] for line in still if name in line]
        assert values and [line[name] for line in moving if name in line] == pytest.approx(values, abs=1e-6)
    for file in FILES:
        assert largest_difference(classify.file("still", 12, file), classify.file("moving", 12, file)) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_all_wrappers_write_the_same_file(classify, optimizer):
    settings = [*SETTINGS, "--optimizer", optimizer, "--checkpoint_every", 1, "--max_train_steps", 2]
    classify.run("plain", *settings)
    classify.run("ddp", *settings, **DDP)
    finished = classify.run("fsdp", *settings, **FSDP2_BY_LAYER)
    assert "parameters: DTensor; modules computed again: 4;" in finished.output
    classify.run("compiled", *settings, "--compile", faults=[("compile_nothing",)])
    for step in (1, 2):
        for file in FILES:
            plain = classify.file("plain", step, file)
            for name in ("ddp", "fsdp", "compiled"):
                other = classify.file(name, step, file)
                assert layout(other) == layout(plain)
                assert largest_difference(other, plain) < 1e-6


def test_exact_reduction_is_refused(classify):
    finished = classify.start("run", *SETTINGS, "--reduction", "exact", "--max_train_steps", 1, **FSDP2).wait()
    assert finished.code == 2, finished.output
    assert "--reduction exact" in finished.output and "FSDP" in finished.output
    assert "Traceback" not in finished.output
