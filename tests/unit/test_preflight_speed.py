"""Preflight's figures of speed and memory, and its test of learning rates."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from tests.subjects import classify_subject, statuses
from train.engine import loop
from train.engine.checks import rate, speed
from train.engine.checks.rate import Curve, check_learning_rate
from train.engine.checks.round_trip import _differences, _image
from train.engine.checks.speed import check_speed


def blobs(folder, **settings):
    """Return the quickest run there is."""
    return classify_subject(folder, **{"dataset": "blobs", "model": "mlp", "learning_rate": 1e-2, **settings})


def by_name(findings):
    """Return the findings by the name of their check; they must be fit for a report."""
    found = {finding.check: finding for finding in findings}
    for finding in found.values():
        assert bool(finding.causes) == (finding.status in ("warn", "fail")), finding
        json.dumps(finding.values, allow_nan=False)
    return found


class SlowLoader:
    """Takes its time for every batch."""

    def __init__(self, loader, seconds):
        self.loader, self.seconds = loader, seconds
        self.num_samples, self.batch_size = loader.num_samples, loader.batch_size

    def batches(self, epoch, start):
        """Yield the batches of an epoch."""
        for batch in self.loader.batches(epoch, start):
            time.sleep(self.seconds)
            yield batch


# ---- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 16, "ema_decay": 0.9}, {"reduction": "exact"}])
def test_a_sound_run_passes_and_is_as_before(tmp_path, settings):
    subject = blobs(tmp_path, **settings)
    before = _image(subject)
    found = by_name(check_speed(subject))
    assert statuses(found.values()) == {"speed": "pass", "duration": "pass", "micro batch": "pass"}
    assert _differences(subject, before, _image(subject)) == []
    values = found["speed"].values
    assert values["steps"] == speed.STEPS
    assert values["samples_per_second"] == pytest.approx(64 / values["seconds_a_step"])
    parts = values["parts"]
    assert parts.pop("exchange") == 0
    assert min(parts.values()) > 0
    assert values["memory_mb"] > 50


def test_the_weights_stand_still_while_time_is_taken(tmp_path):
    subject = blobs(tmp_path)
    loop = speed._standing_loop(subject)
    before = [parameter.clone() for parameter in subject.model.parameters()]
    speed._time_steps(loop, iter([next(subject.loader.batches(0, 0))]), 1)
    assert all(one.equal(other) for one, other in zip(before, subject.model.parameters()))


def test_slow_input_is_pointed_out(tmp_path):
    subject = blobs(tmp_path)
    subject.loader = SlowLoader(subject.loader, 0.01)
    finding = by_name(check_speed(subject))["speed"]
    assert finding.status == "warn"
    assert finding.values["parts"]["input"] > 0.01
    assert "--num_workers" in finding.causes[0]


def test_parts_are_told_apart(tmp_path, monkeypatch):
    subject = blobs(tmp_path)
    sound, adam = subject.measure, loop.update_weights

    def measure(model, batch):
        time.sleep(0.01)
        return sound(model, batch)

    def step(optimizer):
        time.sleep(0.005)
        adam(optimizer)

    subject.measure = measure
    monkeypatch.setattr(loop, "update_weights", step)
    parts = by_name(check_speed(subject))["speed"].values["parts"]
    assert parts["forward"] > 0.01
    assert parts["optimizer"] > 0.005
    assert max(parts["backward"], parts["input"]) < parts["forward"]


def test_steps_are_fewer_where_they_are_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 1e-6)
    monkeypatch.setattr(speed, "WARM_UP_SECONDS", 0.0)
    assert by_name(check_speed(blobs(tmp_path)))["speed"].values["steps"] == speed.FEWEST


@pytest.mark.parametrize(("settings", "evaluations"), [({}, 3), ({"eval_every": "40"}, 3), ({"ema_decay": 0.9}, 6)])
def test_the_duration_adds_up(tmp_path, settings, evaluations):
    subject = blobs(tmp_path, num_train_epochs=3, checkpoint_every="10", **settings)
    steps = 3 * math.ceil(subject.loader.num_samples / 64)
    calls = []

    def evaluate(model):
        calls.append(model)
        time.sleep(0.1)

    subject.evaluate = evaluate
    finding = by_name(check_speed(subject))["duration"]
    values = finding.values
    assert len(calls) == 1
    assert (values["steps"], values["evaluations"], values["saves"]) == (steps, evaluations, steps // 10 + 1)
    assert values["evaluation_seconds"] >= 0.1
    assert values["seconds"] > evaluations * 0.1
    assert finding.measured.startswith("about 0:00:")


def test_the_largest_pass_is_found_from_memory(tmp_path, monkeypatch):
    subject = blobs(tmp_path)
    batch = next(subject.loader.batches(0, 0))
    values = speed._find_micro_batch(subject, batch).values
    # Two inputs, 32 hidden values and two logits of 4 bytes each, a label of 8, a mark of label smoothing of 1.
    assert values["bytes_a_sample"] == 4 * (2 + 32 + 2) + 8 + 1
    samples = batch.slots[0].batch
    assert speed._kept_per_sample(subject, {name: value[:1] for name, value in samples.items()}) == 153 + 4  # a sum
    assert (values["present"], values["largest"]) == (64, 64)
    gradients = 4 * 162
    monkeypatch.setattr(speed, "_memory_left", lambda subject: gradients + 40.5 * values["bytes_a_sample"])
    finding = speed._find_micro_batch(subject, batch)
    assert finding.status == "warn"
    assert finding.values["largest"] == 32
    assert "--micro_batch_size 32" in finding.causes[0]
    monkeypatch.setattr(speed, "_memory_left", lambda subject: gradients + 70 * values["bytes_a_sample"])
    assert speed._find_micro_batch(subject, batch).status == "warn"  # 91 %
    monkeypatch.setattr(speed, "_memory_left", lambda subject: gradients + 72 * values["bytes_a_sample"])
    assert speed._find_micro_batch(subject, batch).status == "pass"


def test_powers_of_two():
    assert [speed._power_of_two(number) for number in (-5, 0, 1, 2, 3, 4, 1023)] == [0, 0, 1, 2, 2, 4, 512]


# ---- learning rates --------------------------------------------------------------------------------------------------


def test_a_good_rate_passes_and_the_curve_is_drawn(tmp_path):
    subject = blobs(tmp_path)
    before = _image(subject)
    finding = by_name(check_learning_rate(subject))["learning rate"]
    assert finding.status == "pass"
    assert _differences(subject, before, _image(subject)) == []
    values = finding.values
    assert len(values["rates"]) == len(values["losses"]) == len(values["smooth"]) < rate.STEPS
    assert values["smooth"][-1] > rate.DIVERGED * min(values["smooth"])
    assert values["rates"][0] == pytest.approx(rate.LOWEST)
    assert values["rates"][1] / values["rates"][0] == pytest.approx(1e8 ** (1 / 99))
    assert 1e-4 < values["suggestion"] < 1
    assert (subject.session.run.plots / "learning_rate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("factor", "word"), [(1e3, "too high"), (1e-6, "too low")])
def test_rates_far_off_are_pointed_out(tmp_path, factor, word):
    subject = blobs(tmp_path, learning_rate=1e-2 * factor)
    finding = by_name(check_learning_rate(subject))["learning rate"]
    assert finding.status == "warn"
    assert word in finding.measured
    assert "--learning_rate" in finding.causes[0]


def test_the_curve_does_not_depend_on_the_rate_of_the_run(tmp_path):
    one, other = (
        by_name(check_learning_rate(blobs(tmp_path, learning_rate=own, lr_scheduler=shape)))["learning rate"].values
        for own, shape in ((1e-2, "one_cycle"), (0.5, "constant"))
    )
    assert one["losses"][:50] == pytest.approx(other["losses"][:50], rel=1e-3)


def test_a_loss_that_does_not_fall_is_pointed_out(tmp_path):
    subject = blobs(tmp_path)
    sound = subject.measure
    subject.measure = lambda model, batch: {**(v := sound(model, batch)), "loss": 1 + 0 * v["loss"]}
    finding = by_name(check_learning_rate(subject))["learning rate"]
    assert finding.status == "warn"
    assert "does not fall" in finding.measured


def test_nonfinite_losses_end_the_test_quietly(tmp_path, capsys):
    subject = blobs(tmp_path)
    sound, calls = subject.measure, []

    def measure(model, batch):
        calls.append(1)
        values = sound(model, batch)
        return values if len(calls) < 60 else {**values, "loss": values["loss"] * torch.nan}

    subject.measure = measure
    finding = by_name(check_learning_rate(subject))["learning rate"]
    assert len(finding.values["rates"]) == 59
    assert by_name(check_learning_rate(subject))["learning rate"].status == "warn"  # from the first step on
    assert capsys.readouterr().out == ""


def test_a_run_without_folder_draws_nothing(tmp_path):
    subject = blobs(tmp_path)
    subject.session = replace(subject.session, run=None)
    assert by_name(check_learning_rate(subject))["learning rate"].status == "pass"
    assert not (tmp_path / "plots").exists()


def test_the_points_of_a_curve():
    rates = [10.0**power for power in range(-6, 2)]
    smooth = [2.0, 2.0, 1.9, 1.5, 0.7, 0.5, 0.6, 3.0]
    curve = Curve(rates, smooth, smooth)
    assert curve.lowest == 5
    assert curve.suggestion == pytest.approx(1e-2)
    assert curve.steepest == pytest.approx(1e-3)  # from 1.9 to 0.7
    judged = {own: rate._judge(curve, own) for own in (1e-5, 1e-4, 1e-1, 2e-1)}
    assert [finding.status for finding in judged.values()] == ["warn", "pass", "pass", "warn"]
