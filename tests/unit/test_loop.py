"""What a single step of the loop leaves as it was."""

import pytest
import torch
from torch import nn

from tests.subjects import classify_subject
from train.classify import ClassifySettings
from train.engine.checks.probe import coming_batches, probe_loop, take_step
from train.engine.tensors import named_tensors
from train.reconstruct import ReconstructSettings


@pytest.mark.parametrize("micro_batch_size", [None, 16])
def test_a_step_that_is_not_applied_leaves_the_averages_of_batch_norm_as_they_were(tmp_path, micro_batch_size):
    def build(*_):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    settings = {"on_nonfinite": "skip", "batch_size": 32, "micro_batch_size": micro_batch_size}
    subject = classify_subject(tmp_path, build=build, **settings)
    loop = probe_loop(subject)
    batches = coming_batches(loop)
    take_step(loop, next(batches))
    before = {name: tensor.clone() for name, tensor in named_tensors(subject.state.model)[0].items()}
    assert any("running_mean" in name for name in before)
    batch = next(batches)
    batch.slots[-1].batch["inputs"][0] = torch.inf
    take_step(loop, batch)
    now = named_tensors(subject.state.model)[0]
    assert [name for name in before if not before[name].equal(now[name])] == []
    take_step(loop, next(batches))
    assert not before["0.weight"].equal(now["0.weight"])


def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradient_is(tmp_path):
    subject = classify_subject(tmp_path, on_nonfinite="skip", batch_size=32)
    sound, spoiled = subject.measure, [True]

    def measure(model, batch):
        values = sound(model, batch)
        if spoiled[0]:
            extra = torch.zeros(len(values["loss"]))
            extra[3] = torch.inf  # a constant, which has no gradient
            values["loss"] = values["loss"] + extra
        return values

    subject.measure = measure
    loop = probe_loop(subject)
    batches, before = coming_batches(loop), [weight.clone() for weight in subject.state.model.parameters()]
    assert not take_step(loop, next(batches)).applied
    assert all(weight.equal(now) for weight, now in zip(before, subject.state.model.parameters()))
    spoiled[0] = False
    assert take_step(loop, next(batches)).applied


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val/loss", "min"), ("val/ema_loss", "min"), ("val/mse", "min"), ("val/accuracy", "max"), ("val/psnr", "max")],
)
def test_the_name_of_a_metric_says_which_values_are_better(metric, mode):
    for kind in (ClassifySettings, ReconstructSettings):
        assert kind(best_metric=metric).mode == mode
        assert kind(best_metric=metric, best_mode="max").mode == "max"
