"""Models have the layers that were promised, refuse what they cannot take, and keep samples apart."""

import pytest
import torch
from torch import nn

from models.cnn import FastCNN, MnistCNN, SimpleCNN
from models.mlp import MLP

KINDS = [
    (MLP, (2,), 2),
    (MLP, (1, 8, 8), 10),
    (MnistCNN, (1, 28, 28), 10),
    (MnistCNN, (3, 6, 9), 2),
    (SimpleCNN, (3, 32, 32), 10),
    (SimpleCNN, (1, 4, 4), 3),
    (SimpleCNN, (3, 17, 30), 5),
    (FastCNN, (1, 28, 28), 10),
    (FastCNN, (3, 30, 41), 4),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}")
def built(request):
    """Return a model and a batch of four samples for it."""
    kind, shape, num_classes = request.param
    torch.manual_seed(0)
    return kind(shape, num_classes), torch.randn(4, *shape), num_classes


def layers(model):
    """Return the sizes of the layers that hold weights, and the names and shares of the others."""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            found.append(("conv", layer.in_channels, layer.out_channels, layer.kernel_size[0]))
        elif isinstance(layer, nn.Linear):
            found.append(("linear", layer.in_features, layer.out_features))
        elif isinstance(layer, nn.Dropout):
            found.append(("dropout", layer.p))
        elif isinstance(layer, nn.BatchNorm2d):
            found.append(("norm", layer.num_features))
        elif isinstance(layer, nn.MaxPool2d):
            found.append(("pool", layer.kernel_size))
    return found


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_output_is_one_logit_for_each_class(built):
    model, inputs, num_classes = built
    assert model(inputs).shape == (4, num_classes)
    assert model(inputs[:1]).shape == (1, num_classes)


def test_samples_of_a_batch_do_not_influence_each_other(built):
    model, inputs, _ = built
    inputs.requires_grad_()
    for sample in range(len(inputs)):
        (gradient,) = torch.autograd.grad(model.eval()(inputs)[sample].sum(), inputs)
        others = torch.arange(len(inputs)) != sample
        assert gradient[others].eq(0).all()
        assert gradient[sample].ne(0).any()


def test_every_parameter_learns(built):
    model, inputs, num_classes = built
    nn.functional.cross_entropy(model.eval()(inputs), torch.arange(4) % num_classes).backward()
    assert all(parameter.grad is not None and parameter.grad.ne(0).any() for parameter in model.parameters())


def test_evaluation_has_no_randomness(built):
    model, inputs, _ = built
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_mlp_for_points_is_2_32_2():
    model = MLP()
    assert layers(model) == [("linear", 2, 32), ("linear", 32, 2)]
    assert count(model) == 2 * 32 + 32 + 32 * 2 + 2 == 162
    assert any(isinstance(layer, nn.ReLU) for layer in model.modules())


def test_mnist_cnn_has_the_layers_that_were_promised():
    model = MnistCNN()
    assert layers(model) == [
        ("conv", 1, 32, 3),
        ("conv", 32, 64, 3),
        ("pool", 2),
        ("dropout", 0.25),
        ("linear", 64 * 12 * 12, 128),
        ("dropout", 0.5),
        ("linear", 128, 10),
    ]
    assert count(model) == 1_199_882


def test_mnist_cnn_drops_units_in_training():
    model, images = MnistCNN(), torch.randn(2, 1, 28, 28)
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("shape", "flat"), [((3, 32, 32), 64 * 8 * 8), ((3, 7, 9), 64 * 1 * 2), ((1, 64, 20), 64 * 16 * 5)]
)
def test_simple_cnn_has_the_layers_that_were_promised_at_any_size(shape, flat):
    assert layers(SimpleCNN(shape, 7)) == [
        ("conv", shape[0], 32, 3),
        ("pool", 2),
        ("conv", 32, 64, 3),
        ("pool", 2),
        ("linear", flat, 128),
        ("linear", 128, 7),
    ]


@pytest.mark.parametrize(("shape", "flat"), [((1, 28, 28), 96), ((3, 30, 41), 96 * 1 * 3)])
def test_fast_cnn_has_the_layers_that_its_description_names(shape, flat):
    assert layers(FastCNN(shape, 10)) == [
        ("conv", shape[0], 16, 5),
        ("pool", 3),
        ("norm", 16),
        ("conv", 16, 64, 3),
        ("pool", 2),
        ("norm", 64),
        ("conv", 64, 96, 3),
        ("norm", 96),
        ("linear", flat, 10),
    ]
    assert shape[0] != 1 or count(FastCNN(shape, 10)) == 66_234


def test_fast_cnn_trains_on_a_single_sample():
    torch.manual_seed(0)
    model, image = FastCNN(), torch.randn(1, 1, 28, 28)
    assert model.train()(image).isfinite().all()
    last = model.features[9]
    assert torch.equal(last.running_mean, torch.zeros(96))  # one value has no variance to be remembered
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    assert not torch.equal(last.running_mean, torch.zeros(96))


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        (MnistCNN, (1, 5, 28), "mnist_cnn needs images of 6 x 6 pixels or more, these are 5 x 28"),
        (MnistCNN, (1, 28, 5), "6 x 6 pixels or more, these are 28 x 5"),
        (SimpleCNN, (3, 3, 32), "simple_cnn needs images of 4 x 4 pixels or more, these are 3 x 32"),
        (SimpleCNN, (3, 32, 3), "4 x 4 pixels or more, these are 32 x 3"),
        (FastCNN, (1, 27, 28), "fast_cnn needs images of 28 x 28 pixels or more, these are 27 x 28"),
        (FastCNN, (1, 28, 27), "28 x 28 pixels or more, these are 28 x 27"),
        (MnistCNN, (2,), "mnist_cnn needs images, the samples have shape (2,); try --model mlp"),
        (SimpleCNN, (2,), "simple_cnn needs images, the samples have shape (2,); try --model mlp"),
        (SimpleCNN, (28, 28), "simple_cnn needs images"),
    ],
)
def test_samples_that_a_network_cannot_take_are_refused(kind, shape, said):
    with pytest.raises(ValueError, match="needs images") as caught:
        kind(shape, 10)
    assert said in str(caught.value)
