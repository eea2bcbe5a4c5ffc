"""Preflight tells a sound step and a sound checkpoint from broken ones, and leaves nothing behind."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.subjects import classify_subject, statuses
from train.engine import storage
from train.engine.checks import loop_gradient, round_trip
from train.engine.checks.finding import Finding
from train.engine.checks.round_trip import check_round_trip
from train.engine.checks.step import check_step
from train.engine.loop import Loop
from train.engine.optimizer import build_optimizer
from train.engine.randomness import capture_rng, restore_rng
from train.engine.settings import parse_every

NAMES = [
    "loss of a sample",
    "gradient of the loop",
    "gradients cleared",
    "step size",
    "step direction",
    "first steps",
    "weights updated",
]


def blobs(folder, **settings):
    """Return the quickest run there is."""
    return classify_subject(folder, **{"dataset": "blobs", "model": "mlp", "learning_rate": 1e-2, **settings})


def by_name(findings):
    """Return the findings by the name of their check; they must be fit for a report."""
    found = {finding.check: finding for finding in findings}
    for finding in found.values():
        assert isinstance(finding, Finding)
        assert finding.measured
        assert bool(finding.causes) == (finding.status in ("warn", "fail")), finding
        json.dumps(finding.values, allow_nan=False)
    return found


# ---- sound runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 16},
        {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.01},
        {"reduction": "exact", "slots": 4, "ema_decay": 0.9},
        {"dataset": "digits", "model": "mnist_cnn", "micro_batch_size": 16, "learning_rate": 1e-3},  # dropout
        {"dataset": "wine", "batch_size": 32, "warmup_steps": 50},
    ],
)
def test_a_sound_run_passes_and_is_as_before(tmp_path, settings):
    subject = blobs(tmp_path, **settings)
    before = round_trip._image(subject)
    found = by_name([*check_step(subject), *check_round_trip(subject)])
    assert ("averages move" in found) == ("ema_decay" in settings)
    found.pop("averages move", None)
    assert list(found) == [*NAMES, "round trip", "saving"]
    found.pop("saving")  # depends on the disk
    assert {finding.status for finding in found.values()} == {"pass"}, found
    assert round_trip._differences(subject, before, round_trip._image(subject)) == []
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert found["gradient of the loop"].values["apart"] < 1e-6
    assert list(subject.session.run.checkpoints.iterdir()) == []


def test_the_reference_is_the_gradient_of_the_mean_loss(tmp_path):
    subject = blobs(tmp_path, micro_batch_size=16)
    batch = next(subject.loader.batches(0, 0))
    assert len(batch.slots) == 4
    model = subject.model
    parts = [slot.batch for slot in batch.slots]
    loss = nn.functional.cross_entropy(
        model(torch.cat([part["inputs"] for part in parts])),
        torch.cat([part["labels"] for part in parts]),
        label_smoothing=0.1,
    )
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    found = loop_gradient.reference_gradient(subject, batch)
    for one, other in zip(wanted, found.values()):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)


# ---- broken steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "cause"), [(4, "once more"), (1 / 4, "averaged by itself")])
def test_a_gradient_of_the_wrong_size_fails(tmp_path, monkeypatch, factor, cause):
    sound = Loop._forward_backward

    def broken(self, slot, batch_size, *, last):
        return sound(self, slot, batch_size * factor, last=last)

    monkeypatch.setattr(Loop, "_forward_backward", broken)
    found = by_name(check_step(blobs(tmp_path, micro_batch_size=16)))
    assert found["gradient of the loop"].status == "fail"
    assert cause in found["gradient of the loop"].causes[0]


def test_a_gradient_of_the_right_size_but_another_direction_fails(tmp_path, monkeypatch):
    """As from processes that do not exchange theirs, or not all of them."""
    sound = Loop._forward_backward

    def broken(self, slot, batch_size, *, last):
        values = sound(self, slot, batch_size, last=last)
        for parameter in self.parameters[:1] if last else []:
            parameter.grad.neg_()
        return values

    monkeypatch.setattr(Loop, "_forward_backward", broken)
    finding = by_name(check_step(blobs(tmp_path, micro_batch_size=16)))["gradient of the loop"]
    assert finding.status == "fail"
    assert finding.values["norm"] == pytest.approx(finding.values["reference"])


def test_every_pass_starts_from_the_buffers_of_the_step(tmp_path):
    subject = blobs(tmp_path, micro_batch_size=16)
    subject.model.register_buffer("seen", torch.zeros(()))
    sound = subject.measure

    def measure(model, batch):
        if model.training:
            model.seen += 1
        values = sound(model, batch)
        return {**values, "loss": values["loss"] * model.seen.clone()}

    subject.measure = measure
    assert by_name(check_step(subject))["gradient of the loop"].status == "pass"


def test_gradients_that_are_left_fail(tmp_path, monkeypatch):
    subject = blobs(tmp_path)
    monkeypatch.setattr(Loop, "_drop_gradients", lambda self: None)
    found = by_name(check_step(subject))
    assert found["gradients cleared"].status == "fail"
    assert "layers.1.weight" in found["gradients cleared"].measured
    assert "zero_grad" in found["gradients cleared"].causes[0]
    assert found["gradient of the loop"].status == "pass"
    assert all(parameter.grad is None for parameter in subject.model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("factor", "word"), [(1e3, "too high"), (1e-6, "too low")])
def test_rates_far_off_fail(tmp_path, optimizer, factor, word):
    rate = {"adamw": 1e-2, "sgd": 0.1}[optimizer]
    found = by_name(check_step(blobs(tmp_path, optimizer=optimizer, learning_rate=rate * factor)))
    assert found["step size"].status == "fail"
    assert word in found["step size"].measured
    assert (found["first steps"].status == "fail") == (word == "too high")
    assert found["weights updated"].status != "fail"


def test_the_step_is_taken_at_the_peak_rate(tmp_path):
    plain = by_name(check_step(blobs(tmp_path, lr_scheduler="constant")))["step size"].values["size"]
    warm = by_name(check_step(blobs(tmp_path, lr_scheduler="cosine", warmup_steps=1000)))["step size"].values["size"]
    assert warm == plain > 0


def test_a_stale_optimizer_fails(tmp_path):
    subject = blobs(tmp_path)
    subject.state.optimizer = build_optimizer(subject.settings, copy.deepcopy(subject.model))
    found = by_name(check_step(subject))
    assert statuses(found.values()) == {"weights updated": "fail"}
    assert "replaced" in found["weights updated"].causes[0]
    assert found["weights updated"].stop


def test_parameters_without_optimizer_fail(tmp_path):
    subject = blobs(tmp_path, weight_decay=0.1)  # two groups
    subject.state.optimizer.param_groups.pop()
    finding = by_name(check_step(subject))["weights updated"]
    assert finding.status == "fail"
    assert finding.values["unchanged"] == ["layers.1.bias", "layers.3.bias"]


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_nonfinite_gradient_is_a_finding(tmp_path, on_nonfinite, capsys):
    subject = blobs(tmp_path, on_nonfinite=on_nonfinite)
    sound = subject.measure
    subject.measure = lambda model, batch: {**(values := sound(model, batch)), "loss": values["loss"] * torch.nan}
    found = by_name(check_step(subject))
    assert found["gradient of the loop"].status == "fail"
    assert "NaN" in found["gradient of the loop"].measured
    assert found["gradient of the loop"].stop
    assert "first steps" not in found
    assert capsys.readouterr().out == ""


def test_a_loss_that_becomes_nonfinite_is_a_finding(tmp_path):
    subject = blobs(tmp_path)
    sound, calls = subject.measure, []

    def measure(model, batch):
        calls.append(model.training)
        values = sound(model, batch)
        return values if sum(calls) < 6 else {**values, "loss": values["loss"] / 0}

    subject.measure = measure
    finding = by_name(check_step(subject))["first steps"]
    assert finding.status == "fail"
    assert finding.values["losses"][-1] is None


def test_a_loss_that_depends_on_the_batch_does_not_pass(tmp_path):
    subject = blobs(tmp_path)
    sound = subject.measure

    def mean(model, batch):
        values = sound(model, batch)
        return {**values, "loss": values["loss"] / len(values["loss"])}

    def contrast(model, batch):
        values = sound(model, batch)
        return {**values, "loss": values["loss"] + 0.5 * values["loss"].max()}

    subject.measure = mean
    finding = by_name(check_step(subject))["loss of a sample"]
    assert finding.status == "fail"
    assert "reduction" in finding.causes[0]
    subject.measure = contrast
    assert by_name(check_step(subject))["loss of a sample"].status == "warn"


class Compiled(nn.Module):
    """Wraps a model as torch.compile does; the first layer gets no gradient."""

    def __init__(self, model, broken):
        super().__init__()
        self._orig_mod = model
        self.broken = broken

    def forward(self, inputs):
        """[B, 2] to [B, 2]."""
        layers = self._orig_mod.layers
        hidden = layers[2](layers[1](inputs))
        return layers[3](hidden.detach() if self.broken else hidden)


@pytest.mark.parametrize("broken", [False, True])
def test_a_compiled_model_without_gradients_fails(tmp_path, broken):
    subject = blobs(tmp_path)
    subject.settings = replace(subject.settings, compile=True)
    subject.state.model = Compiled(subject.model, broken)
    found = by_name(check_step(subject))
    finding = found.pop("compiled gradient")
    assert finding.status == ("fail" if broken else "pass")
    assert ("layers.1.weight (0 for" in finding.measured) == broken
    assert "layers.3" not in finding.measured
    assert list(found) == NAMES


# ---- the round trip --------------------------------------------------------------------------------------------------


def test_the_report_has_size_and_seconds(tmp_path):
    values = by_name(check_round_trip(blobs(tmp_path)))["round trip"].values
    assert values["size"] > 3 * 4 * 162  # weights and two moments
    assert values["save_seconds"] > 0
    assert values["load_seconds"] > 0


def test_moments_that_are_not_restored_fail(tmp_path, monkeypatch):
    sound = round_trip.restore

    def broken(state, *arguments):
        sound(state, *arguments)
        next(iter(state.optimizer.state.values()))["exp_avg"].zero_()

    monkeypatch.setattr(round_trip, "restore", broken)
    subject = blobs(tmp_path)
    finding = by_name(check_round_trip(subject))["round trip"]
    assert finding.status == "fail"
    assert any(name.endswith("exp_avg") for name in finding.values["different"])
    assert list(subject.session.run.checkpoints.iterdir()) == []


@pytest.mark.parametrize("part", ["model", "optimizer", "ema", "progress", "rng"])
def test_any_part_that_is_not_restored_fails(tmp_path, monkeypatch, part):
    """The state in memory is wrecked: what loading leaves out cannot be right by chance."""
    sound = round_trip.restore

    def broken(state, runtime, files, record):
        kept = copy.deepcopy((list(state.model.parameters()), state.ema, state.progress))
        moments, generators = dict(state.optimizer.state), capture_rng(runtime.device)
        sound(state, runtime, files, record)
        if part == "model":
            with torch.no_grad():
                torch._foreach_copy_(list(state.model.parameters()), kept[0])
        elif part == "optimizer":
            state.optimizer.state.clear()
            state.optimizer.state.update(moments)
        elif part == "ema":
            state.ema = kept[1]
        elif part == "progress":
            state.progress = kept[2]
        else:
            restore_rng(generators, runtime.device)

    monkeypatch.setattr(round_trip, "restore", broken)
    subject = blobs(tmp_path, on_nonfinite="skip", ema_decay=0.9)
    different = by_name(check_round_trip(subject))["round trip"].values["different"]
    assert any(name.startswith(part) for name in different)


def test_a_counter_in_python_fails(tmp_path):
    subject = blobs(tmp_path)
    sound, calls = subject.measure, []

    def measure(model, batch):
        calls.append(1)
        values = sound(model, batch)
        return {**values, "loss": values["loss"] * (1 + 0.01 * len(calls))}

    subject.measure = measure
    finding = by_name(check_round_trip(subject))["round trip"]
    assert finding.status == "fail"
    assert "4 steps differ from 4 steps, too" in finding.measured
    assert "counter" in finding.causes[0]


def test_a_damaged_checkpoint_fails(tmp_path, monkeypatch):
    sound = round_trip.open_checkpoint

    def damaged(path):
        with open(path / "model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        return sound(path)

    monkeypatch.setattr(round_trip, "open_checkpoint", damaged)
    subject = blobs(tmp_path)
    found = by_name(check_round_trip(subject))
    assert statuses(found.values()) == {"round trip": "fail"}
    assert "altered" in found["round trip"].measured
    assert list(subject.session.run.checkpoints.iterdir()) == []


def test_a_dry_run_is_skipped(tmp_path):
    subject = blobs(tmp_path)
    subject.session = replace(subject.session, run=None)
    assert statuses(check_round_trip(subject)) == {"round trip": "skip"}


def test_a_killed_round_trip_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(round_trip, "remove_tree", lambda path: None)
    subject = blobs(tmp_path)
    list(check_round_trip(subject))
    folder = subject.session.run.checkpoints
    assert list(folder.iterdir())
    storage.sweep(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("every", "blocked", "writing", "total", "status"),
    [
        ("1000", 1.0, 1.0, 100_000, "pass"),  # 1 s in 100
        ("10", 1.0, 1.0, 100_000, "warn"),  # 1 s in 2
        ("10", 1.0, 1.0, 50, "pass"),  # 5 s in all
        ("10", 0.01, 3.0, 100_000, "warn"),  # the next one waits for 2 s
        ("1 minutes", 1.0, 1.0, 100_000, "pass"),
        ("0.1 minutes", 1.0, 1.0, 100_000, "warn"),
    ],
)
def test_saving_too_often_is_pointed_out(every, blocked, writing, total, status):
    loop = SimpleNamespace(
        checkpoint_every=parse_every(every),
        steps_per_epoch=7,
        total_steps=total,
        settings=SimpleNamespace(checkpoint_every=every),
    )
    finding = round_trip._judge_interval(loop, 0.1, blocked, writing)
    assert finding.status == status
    if blocked == 1.0:
        assert finding.values["steps_for_one_percent"] == 990
