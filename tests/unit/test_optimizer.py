"""Which parameters get weight decay, and which optimizer; what a checkpoint of other groups is told."""

import pytest
import torch
from torch import nn

from models.cnn import FastCNN, SimpleCNN
from models.lstm import SimpleLSTM
from models.mlp import MLP
from tests.subjects import classify_subject, statuses
from train.engine.checks.round_trip import check_round_trip
from train.engine.checks.step import check_step
from train.engine.errors import UsageError
from train.engine.muon import MuonWithAdamW
from train.engine.optimizer import build_optimizer, capture_optimizer, restore_optimizer
from train.engine.settings import TrainSettings

MODELS = [lambda: FastCNN(), lambda: SimpleLSTM(50, 2), lambda: MLP((5,), 3, category_sizes=(4,))]


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def groups_of(model, **settings):
    """Return the names in each group, with what decays."""
    optimizer = build_optimizer(TrainSettings(weight_decay=0.1, **settings), model)
    return [(names_of(model, group), group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("build", MODELS)
def test_biases_and_norms_have_no_weight_decay(kind, build):
    model = build()
    (decays, share), (spared, none) = groups_of(model, optimizer=kind)
    assert (share, none) == (0.1, 0.0)
    assert decays | spared == {name for name, _ in model.named_parameters()} and not decays & spared
    norms = {f"features.{number}.{part}" for number in (2, 6, 9) for part in ("weight", "bias")}
    wanted = {name for name, _ in model.named_parameters() if "bias" in name}
    assert spared == (wanted | norms if isinstance(model, FastCNN) else wanted)


def trained(settings, groups=None):
    model = MLP()
    optimizer = build_optimizer(settings, model) if groups is None else torch.optim.AdamW(groups(model))
    nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.zeros(4, dtype=torch.int64)).backward()
    optimizer.step()
    return model, optimizer


def test_without_weight_decay_there_is_one_group_and_the_same_steps():
    pairs = []
    for decay in (0.0, 1e-30):  # which does nothing in float32
        torch.manual_seed(0)
        pairs.append(trained(TrainSettings(weight_decay=decay)))
    assert [len(optimizer.param_groups) for _, optimizer in pairs] == [1, 2]
    (model, _), (other, _) = pairs
    assert all(one.equal(same) for one, same in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.1), (0.1, 0.0), (0.1, 0.2)])
def test_weight_decay_that_the_user_changed_regroups(before, after):
    model, optimizer = trained(TrainSettings(weight_decay=before))
    tensors, record = capture_optimizer(optimizer, model)
    restored = build_optimizer(TrainSettings(weight_decay=after), model)
    restore_optimizer(restored, model, tensors, record, changed=["weight_decay"])
    assert [group["weight_decay"] for group in restored.param_groups] == ([after, 0.0] if after else [0.0])
    for parameter in model.parameters():
        assert restored.state[parameter]["exp_avg"].equal(optimizer.state[parameter]["exp_avg"])
    fresh = build_optimizer(TrainSettings(weight_decay=after), model)
    if before and not after:  # two values of a setting, and nobody agreed to lose one
        with pytest.raises(ValueError, match="other settings for some of them"):
            restore_optimizer(fresh, model, tensors, record)
        assert not fresh.state and fresh.param_groups[0]["weight_decay"] == 0


def test_groups_of_an_older_checkpoint_go_on_with_their_settings():
    """One for all, one for each parameter, in another order."""
    shapes = [
        lambda model: list(model.parameters())[::-1],
        lambda model: [{"params": [parameter]} for parameter in model.parameters()],
    ]
    for groups in shapes:
        model, optimizer = trained(None, groups)
        tensors, record = capture_optimizer(optimizer, model)
        restored = build_optimizer(TrainSettings(weight_decay=0.3), model)
        restore_optimizer(restored, model, tensors, record)
        assert {group["weight_decay"] for group in restored.param_groups} == {0.01}


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (MLP((5,), 3, category_sizes=(4,)), {"layers.1.weight"}),
        (SimpleCNN((1, 8, 8)), {"classifier.1.weight"}),
        (SimpleLSTM(50, 2), {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}),
    ],
    ids=["mlp", "cnn", "lstm"],
)
def test_muon_gets_matrices_but_neither_embeddings_nor_the_output_layer(model, wanted):
    (hidden, share), *others = groups_of(model, optimizer="muon")
    assert hidden == wanted and share == 0.1
    assert set().union(*(names for names, _ in others)) == {name for name, _ in model.named_parameters()} - wanted
    assert [share for _, share in others] == [0.1, 0.0]


def test_muon_with_adamw_takes_the_steps_of_each():
    """Against torch's two optimizers by hand, also after Accelerate's way through a state dict."""
    model, other = MLP(), MLP()
    other.load_state_dict(model.state_dict())
    settings = TrainSettings(optimizer="muon", weight_decay=0.1, learning_rate=0.02)
    optimizer = build_optimizer(settings, model)
    assert isinstance(optimizer, MuonWithAdamW)
    optimizer.load_state_dict(optimizer.state_dict())
    hidden, *rest = (dict(other.named_parameters())[name] for name, _ in model.named_parameters())
    muon = torch.optim.Muon([hidden], 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": [rest[1]], "weight_decay": 0.1}, {"params": [rest[0], rest[2]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, 0.02)
    for step in range(4):
        points = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
        if step == 2:  # what the loop does to the rate
            for group in [*optimizer.param_groups, *muon.param_groups, *adamw.param_groups]:
                group["lr"] = 0.01
        for each in (model, other):
            each.zero_grad()
            nn.functional.cross_entropy(each(points), (points[:, 0] > 0).long()).backward()
        for each in (optimizer, muon, adamw):
            each.step()
    for one, same in zip(model.parameters(), other.parameters()):
        assert one.equal(same)
    assert {len(values) for values in optimizer.state.values()} == {1, 3}


def test_muon_without_a_hidden_matrix_is_refused():
    with pytest.raises(UsageError, match="--optimizer muon"):
        build_optimizer(TrainSettings(optimizer="muon"), FastCNN())


def test_muon_passes_the_checks_of_a_step_and_of_a_round_trip(tmp_path):
    subject = classify_subject(
        tmp_path, dataset="digits", model="simple_cnn", optimizer="muon", learning_rate=3e-3, ema_decay=0.9
    )
    found = statuses([*check_step(subject), *check_round_trip(subject)])
    assert found["round trip"] == "pass"
    assert set(found.values()) == {"pass"}, found
