"""Blocks that are computed again in the backward pass give the same bits and keep less."""

import copy

import pytest
import torch
from torch import nn

from models.autoencoder import ConvAutoencoder
from models.cnn import FastCNN, MnistCNN, SimpleCNN
from models.lstm import SimpleLSTM
from models.mlp import MLP
from tests.subjects import classify_subject, statuses
from train.engine.checks.step import check_step
from train.engine.errors import UsageError
from train.engine.recompute import _cut, recompute_blocks

BUILD = {"fast": FastCNN, "mnist": MnistCNN, "simple": lambda: SimpleCNN((1, 28, 28)), "auto": ConvAutoencoder}


def train(model, batches=3):
    """Return all that a few steps leave: outputs, gradients, averages, the state of the generator."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    left = []
    for seed in range(batches):
        torch.manual_seed(seed)
        outputs = model(torch.rand(6, 1, 28, 28))
        optimizer.zero_grad()
        outputs.square().sum().backward()
        left += [outputs.detach(), torch.get_rng_state(), *(parameter.grad for parameter in model.parameters())]
        left += [buffer.clone() for buffer in model.buffers()]
        optimizer.step()
    return [value.clone() for value in left]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_same_bits_as_without(name, momentum):
    torch.manual_seed(0)
    plain = BUILD[name]().train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    for one, other in zip(train(plain), train(recomputed), strict=True):
        assert one.equal(other)
    assert all(norm.momentum == momentum for norm in recomputed.modules() if isinstance(norm, nn.BatchNorm2d))
    copied = copy.deepcopy(recomputed)  # computes with its own weights
    with torch.no_grad():
        for parameter in recomputed.parameters():
            parameter.zero_()
    images = torch.rand(2, 1, 28, 28)
    assert copied.eval()(images).equal(plain.eval()(images))


def test_a_block_begins_at_each_convolution_but_the_first_layers_stay_with_it():
    norm, first, act, second, last = layers = (
        nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.ConvTranspose2d(2, 1, 3), nn.Tanh(),
    )  # fmt: skip
    assert _cut(nn.Sequential(*layers)) == [(norm, first, act), (second, last)]
    assert _cut(nn.Sequential(norm, act)) == [(norm, act)]


def test_less_is_kept_for_backward():
    kept = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SimpleCNN((1, 28, 28)).train()
        if recompute:
            recompute_blocks(model)
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, held=held: held.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
        ):
            model(torch.rand(8, 1, 28, 28)).sum()
        own = {parameter.data_ptr() for parameter in model.parameters()}
        kept.append(sum(tensor.nbytes for pointer, tensor in held.items() if pointer not in own))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("model", [MLP(), SimpleLSTM(50, 2)], ids=["mlp", "lstm"])
def test_models_without_blocks_are_refused(model):
    with pytest.raises(UsageError, match="--gradient_checkpointing"):
        recompute_blocks(model)


def test_channels_last_is_for_convolutions(tmp_path):
    with pytest.raises(UsageError, match="--channels_last"):
        classify_subject(tmp_path, dataset="blobs", model="mlp", channels_last=True)
    subject = classify_subject(tmp_path, model="mnist_cnn", channels_last=True, gradient_checkpointing=True)
    weight = subject.model.features[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    found = statuses(check_step(subject))
    assert "fail" not in found.values(), found
