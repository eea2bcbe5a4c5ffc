"""A step without torch.optim's bookkeeping: the same bits, and torch's own step wherever it is not that simple."""

import pytest
import torch
from torch import nn

from models.mlp import MLP
from train.engine import fused_adam
from train.engine.fused_adam import update_weights
from train.engine.optimizer import build_optimizer
from train.engine.settings import TrainSettings


def run(settings, step, frozen=0, change=lambda group: None):
    """Return the weights and the optimizer's state after six steps, the third without one gradient."""
    torch.manual_seed(0)
    model = MLP()
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad_(False)
    optimizer = build_optimizer(settings, model)
    for group in optimizer.param_groups:
        change(group)
    for number in range(6):
        points = torch.randn(8, 2, generator=torch.Generator().manual_seed(number))
        nn.functional.cross_entropy(model(points), (points[:, 0] > 0).long()).backward()
        if number == 2:
            list(model.parameters())[-1].grad = None
        optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
        step(optimizer)
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *states], optimizer


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1}, {"optimizer": "adam"}, {"optimizer": "sgd"}, {"optimizer": "muon"}]
)
def test_the_bits_of_torch(settings):
    settings = TrainSettings(**settings)
    mine, theirs = run(settings, update_weights)[0], run(settings, lambda optimizer: optimizer.step())[0]
    assert len(mine) == len(theirs) and all(one.equal(other) for one, other in zip(mine, theirs))


@pytest.mark.parametrize("change", [{"maximize": True}, {"amsgrad": True}, {"fused": None}])
def test_what_somebody_changed_in_a_group_holds(change):
    settings = TrainSettings()
    plain = run(settings, update_weights)[0]
    mine, theirs = (
        run(settings, step, change=lambda group: group.update(change))[0]
        for step in (update_weights, lambda optimizer: optimizer.step())
    )
    assert all(one.equal(other) for one, other in zip(mine, theirs))
    if "maximize" in change:
        assert not mine[0].equal(plain[0])


def test_the_kernel_is_called_at_once_from_the_second_step_on(monkeypatch):
    """And with frozen parameters, which the optimizer does not have, too."""
    calls = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, sound=torch.optim.AdamW.step: calls.append(sound(self)))
    kernel = fused_adam.KERNELS[torch.optim.AdamW]
    counted = []

    def count(*arguments, **options):
        counted.append(len(arguments[0]))
        kernel(*arguments, **options)

    monkeypatch.setitem(fused_adam.KERNELS, torch.optim.AdamW, count)
    run(TrainSettings(), update_weights, frozen=1)
    assert len(calls) == 1 and counted == [3, 2, 3, 3, 3]
