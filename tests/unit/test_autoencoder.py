"""The autoencoder takes the sizes that it promises, refuses others, and learns."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.autoencoder import ConvAutoencoder

SIZES = {
    # shape: sides of the smallest features
    (1, 8, 8): (4, 4),
    (1, 28, 28): (7, 7),
    (3, 32, 32): (4, 4),
    (3, 24, 44): (6, 11),
    (3, 64, 64): (4, 4),
    (1, 64, 96): (4, 6),
    (3, 224, 224): (7, 7),
    (1, 256, 256): (8, 8),
    (3, 512, 256): (16, 8),
}


def digits():
    """Return training and test digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1437], images[1437:]


def train(model, images, epochs, learning_rate, batch_size=64):
    source = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    found = []
    for _ in range(epochs):
        for indices in torch.randperm(len(images), generator=source).split(batch_size):
            loss = F.mse_loss(model(images[indices]), images[indices])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
    return found


@pytest.mark.parametrize(("shape", "smallest"), SIZES.items())
def test_images_become_numbers_and_images_of_the_same_size(shape, smallest):
    torch.manual_seed(0)
    model = ConvAutoencoder(shape, bottleneck=5, width=4)
    images = torch.rand(2, *shape)
    assert model.smallest[1:] == smallest
    numbers, found = model.encode(images), model(images)
    assert numbers.shape == (2, 5) and found.shape == images.shape
    assert found.gt(0).all() and found.lt(1).all()
    assert torch.equal(model.decode(numbers), found)
    convolutions = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == 2 * (shape[1] // smallest[0]).bit_length() - 2
    assert sum(isinstance(layer, nn.GELU) for layer in model.modules()) == len(convolutions)


def test_channels_double_once_more_each_and_stop_at_four_times_the_width():
    model = ConvAutoencoder((3, 256, 256), 10, width=8)
    channels = [
        (layer.in_channels, layer.out_channels)
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    ]
    down = [(3, 8), (8, 16), (16, 32), (32, 32), (32, 32)]
    assert channels == [*down, *((after, before) for before, after in reversed(down))]
    linears = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears == [(32 * 8 * 8, 10), (10, 32 * 8 * 8)]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 30, 30), "sides that are multiples of 4, these are 30 x 30; resize to 28 x 28 or 32 x 32"),
        ((3, 100, 100), "multiples of 16, these are 100 x 100; resize to 96 x 96 or 112 x 112"),
        ((3, 64, 72), "multiples of 16, these are 64 x 72; resize to 64 x 64 or 64 x 80"),
        ((3, 255, 257), "multiples of 32, these are 255 x 257; resize to 256 x 256 or 256 x 288"),
        ((3, 60, 72), "multiples of 8, these are 60 x 72; resize to 56 x 72"),
        ((1, 9, 8), "multiples of 2, these are 9 x 8; resize to 8 x 8 or 10 x 8"),
        ((1, 7, 28), "images of 8 x 8 pixels or more, these are 7 x 28"),
        ((1, 28, 7), "images of 8 x 8 pixels or more, these are 28 x 7"),
        ((2,), "conv_autoencoder needs images, the samples have shape (2,)"),
    ],
)
def test_sizes_that_cannot_be_halved_are_refused_with_the_nearest_that_can(shape, said):
    with pytest.raises(ValueError, match="conv_autoencoder needs") as caught:
        ConvAutoencoder(shape)
    assert said in str(caught.value)


@pytest.mark.parametrize("size", range(8, 140))
def test_every_size_that_a_refusal_names_works(size):
    for other in (size, 72):
        try:
            ConvAutoencoder((1, size, other), 1, width=1)
        except ValueError as error:
            for pair in str(error).split("resize to ")[1].split(" or "):
                ConvAutoencoder((1, *map(int, pair.split(" x "))), 1, width=1)


def test_samples_of_a_batch_do_not_influence_each_other():
    torch.manual_seed(0)
    model, images = ConvAutoencoder((1, 28, 28), 8), torch.rand(3, 1, 28, 28, requires_grad=True)
    (slopes,) = torch.autograd.grad(model(images)[1].sum(), images)
    assert slopes[[0, 2]].eq(0).all() and slopes[1].ne(0).any()


@pytest.mark.parametrize("vae", [False, True])
def test_every_parameter_learns(vae):
    torch.manual_seed(0)
    model, images = ConvAutoencoder((3, 32, 32), 8, vae=vae), torch.rand(4, 3, 32, 32)
    F.mse_loss(model(images), images).backward()
    assert all(parameter.grad is not None and parameter.grad.ne(0).any() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 256, 256)])
def test_the_signal_keeps_its_size_through_new_layers(shape):
    torch.manual_seed(0)
    model, signal = ConvAutoencoder(shape, 32), torch.rand(2, *shape)
    spread = []
    for layer in model.encoder[:-2]:
        signal = layer(signal)
        spread.append(signal.std().item())
    signal = torch.randn(2, *model.smallest)
    for layer in model.decoder[2:]:
        signal = layer(signal)
        spread.append(signal.std().item())
    assert all(0.2 < value < 2 for value in spread), spread


def test_one_batch_is_learned_by_more_than_half_in_100_steps():
    torch.manual_seed(0)
    images = F.interpolate(digits()[0][:8], size=(32, 32), mode="bilinear")
    found = train(ConvAutoencoder((1, 32, 32), 32, width=16), images, 100, 1e-3)
    assert found[-1] < 0.5 * found[0]


def test_digits_come_back_better_than_by_principal_components():
    from sklearn.decomposition import PCA

    images, tests = digits()
    components = PCA(16, random_state=0).fit(images.flatten(1))
    linear = components.inverse_transform(components.transform(tests.flatten(1)))
    torch.manual_seed(0)
    model = ConvAutoencoder((1, 8, 8), 16)
    train(model, images, 8, 4e-3, batch_size=32)
    with torch.no_grad():
        ours = F.mse_loss(model(tests), tests).item()
    assert ours < 0.9 * F.mse_loss(torch.tensor(linear).view_as(tests), tests).item()


def test_vae_draws_in_training_only_from_the_global_generator():
    torch.manual_seed(0)
    model, images = ConvAutoencoder((1, 8, 8), 4, vae=True), torch.rand(2, 1, 8, 8)
    assert model.encode(images).shape == (2, 4)
    torch.manual_seed(1)
    first, second = model(images), model(images)
    torch.manual_seed(1)
    assert torch.equal(model(images), first) and not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(images), model.decode(model.encode(images)))


def test_vae_draws_with_the_deviation_that_the_encoder_gives():
    torch.manual_seed(0)
    model, images = ConvAutoencoder((1, 8, 8), 4, vae=True), torch.rand(1, 1, 8, 8).expand(4000, 1, 8, 8)
    drawn = []
    model.decode = lambda numbers: drawn.append(numbers) or numbers
    model(images)
    mean, log_variance = model.encoder(images[:1]).detach().chunk(2, dim=1)
    torch.testing.assert_close(drawn[0].mean(dim=0), mean[0], rtol=0, atol=0.1)
    torch.testing.assert_close(drawn[0].std(dim=0), (log_variance[0] / 2).exp(), rtol=0.1, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_divergence_of_a_vae_is_that_of_normal_distributions_per_image(training):
    torch.manual_seed(0)
    model, images = ConvAutoencoder((1, 8, 8), 4, vae=True).train(training), torch.rand(3, 1, 8, 8)
    found, divergence = model(images, with_kl=True)
    mean, log_variance = model.encoder(images).chunk(2, dim=1)
    encoded = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(encoded, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    assert found.shape == images.shape and divergence.shape == (3,)
    torch.testing.assert_close(divergence, expected)


def test_divergence_is_in_float32_under_autocast():
    torch.manual_seed(0)
    model = ConvAutoencoder((1, 8, 8), 4, vae=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, divergence = model(torch.rand(3, 1, 8, 8), with_kl=True)
    assert divergence.dtype == torch.float32 and found.isfinite().all()


def test_only_a_vae_has_a_divergence():
    with pytest.raises(AssertionError, match="only a VAE has a divergence"):
        ConvAutoencoder((1, 8, 8))(torch.rand(1, 1, 8, 8), with_kl=True)


@pytest.mark.parametrize("vae", [False, True])
def test_autoencoder_compiles_to_one_graph(vae):
    torch.manual_seed(0)
    model, images = ConvAutoencoder((1, 8, 8), 4, vae=vae).eval(), torch.rand(2, 1, 8, 8)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))
