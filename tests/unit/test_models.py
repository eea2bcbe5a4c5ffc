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


def test_mlp_without_categories_has_the_names_and_initial_weights_of_its_two_layers():
    torch.manual_seed(3)
    model = MLP((2, 3), 4, 5)
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    assert [name for name, _ in model.named_modules()] == ["", "layers", *(f"layers.{place}" for place in range(4))]
    for (name, parameter), (expected_name, expected) in zip(
        model.state_dict().items(), layers.state_dict().items(), strict=True
    ):
        assert name == f"layers.{expected_name}" and torch.equal(parameter, expected)
    inputs = torch.randn(7, 2, 3)
    assert torch.equal(model(inputs), layers(inputs))
    assert torch.equal(model(inputs, torch.zeros(7, 0, dtype=torch.int64)), layers(inputs))


def test_mlp_embeds_each_category_in_half_its_size_and_at_most_16():
    model = MLP((3,), 2, 8, category_sizes=(1, 2, 3, 10, 31, 33, 5000))
    embeddings = [(layer.num_embeddings, layer.embedding_dim) for layer in model.embeddings]
    assert embeddings == [(1, 1), (2, 1), (3, 2), (10, 5), (31, 16), (33, 16), (5000, 16)]
    assert layers(model) == [("linear", 3 + 1 + 1 + 2 + 5 + 16 + 16 + 16, 8), ("linear", 8, 2)]


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 2)])
def test_mlp_appends_the_embeddings_to_the_inputs(shape):
    torch.manual_seed(0)
    model = MLP(shape, 2, 8, category_sizes=(4, 6))
    inputs, categories = torch.randn(5, *shape), torch.tensor([[0, 0], [1, 5], [3, 2], [3, 5], [2, 1]])
    parts = [inputs.flatten(1), *(layer.weight[categories[:, k]] for k, layer in enumerate(model.embeddings))]
    assert torch.equal(model(inputs, categories), model.layers(torch.cat(parts, dim=1)))


def test_mlp_learns_of_each_category_only_from_its_samples():
    torch.manual_seed(0)
    model = MLP((3,), 2, 8, category_sizes=(4, 6))
    model(torch.randn(2, 3), torch.tensor([[0, 5], [2, 5]])).square().sum().backward()
    touched = [layer.weight.grad.ne(0).any(dim=1).nonzero()[:, 0].tolist() for layer in model.embeddings]
    assert touched == [[0, 2], [5]]
    assert all(parameter.grad.ne(0).any() for parameter in model.parameters())


def test_mlp_takes_an_unknown_category_for_none():
    model = MLP((3,), 2, 8, category_sizes=(4, 6))
    assert all(layer.weight[0].eq(0).all() and layer.weight[1:].ne(0).all() for layer in model.embeddings)
    assert all(layer.weight.requires_grad and layer.weight.is_leaf for layer in model.embeddings)


@pytest.mark.parametrize("sizes", [(), (4, 6)])
def test_mlp_compiles_to_one_graph(sizes):
    torch.manual_seed(0)
    model = MLP((3,), 2, 8, category_sizes=sizes)
    inputs, categories = torch.randn(5, 3), torch.ones(5, len(sizes), dtype=torch.int64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs, categories), model(inputs, categories))


@pytest.mark.parametrize(("sizes", "given"), [((), 1), ((4,), None), ((4,), 0), ((4, 6), 1), ((4,), 2)])
def test_mlp_takes_as_many_categories_as_it_was_made_for(sizes, given):
    model = MLP((3,), 2, 8, category_sizes=sizes)
    categories = None if given is None else torch.zeros(5, given, dtype=torch.int64)
    with pytest.raises(AssertionError, match="one column of categories for each embedding"):
        model(torch.randn(5, 3), categories)


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
