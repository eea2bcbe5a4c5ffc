"""SSIM agrees with an independent reference and its slopes are right; the other scores are what they say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from models import losses
from models.losses import ms_ssim, psnr, reconstruction_loss, ssim

C1, C2 = 0.01**2, 0.03**2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def terms_of(x, y):
    """Return luminance and contrast at the interior pixels of two images [H, W], by SciPy in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y, xx, yy, xy = (
        gaussian_filter(part, 1.5, truncate=3.5)[5:-5, 5:-5] for part in (x, y, x * x, y * y, x * y)
    )
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    contrast = (2 * (xy - mean_x * mean_y) + C2) / (xx - mean_x**2 + yy - mean_y**2 + C2)
    return luminance, contrast


def reference_ssim(images, targets):
    """Return SSIM per image of two batches [B, C, H, W]."""
    pairs = zip(images.numpy(), targets.numpy())
    return np.array([np.mean([np.prod(terms_of(x, y), axis=0) for x, y in zip(*pair)]) for pair in pairs])


def reference_ms_ssim(images, targets):
    """Return MS-SSIM per image, for sides that are even at each scale."""
    found = []
    for pair in zip(images.numpy().astype(np.float64), targets.numpy().astype(np.float64)):
        values = []
        for x, y in zip(*pair):
            value = 1.0
            for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
                luminance, contrast = terms_of(x, y)
                value *= np.mean(luminance * contrast if scale == 4 else contrast) ** weight
                if scale < 4:
                    x, y = (z.reshape(len(z) // 2, 2, z.shape[1] // 2, 2).mean(axis=(1, 3)) for z in (x, y))
            values.append(value)
        found.append(np.mean(values))
    return np.array(found)


def noisy(shape, noise=0.1, seed=0, dtype=torch.float32):
    """Return images and changed ones."""
    source = torch.Generator().manual_seed(seed)
    images = torch.rand(shape, generator=source, dtype=dtype)
    return images, (images + noise * torch.randn(shape, generator=source, dtype=dtype)).clamp(0, 1)


def photographs(side, channels):
    """Return parts of scikit-learn's two photographs, and the same with noise, blur, and less light."""
    from sklearn.datasets import load_sample_images

    whole = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 255
    images = whole[:, :, 60 : 60 + side, 200 : 200 + side]
    images = images if channels == 3 else images.mean(dim=1, keepdim=True)
    darker, blurred = images * 0.6, F.avg_pool2d(images, 5, stride=1, padding=2)
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return images.repeat(3, 1, 1, 1), torch.cat([darker, blurred, (images + noise).clamp(0, 1)])


def digits(side):
    """Return upscaled digits, each beside the next one."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:9], dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    return images[:-1], images[1:]


def flat(level, other):
    """Return nearly constant images, on which E[x²] - E[x]² cancels."""
    noise = 0.003 * torch.randn(2, 1, 1, 40, 48, generator=torch.Generator().manual_seed(2))
    return (level + noise[0]).clamp(0, 1), (other + noise[1]).clamp(0, 1)


def halves(level, other):
    """Return images of two flat halves, of which no mean is near both."""
    noise = 0.02 * torch.randn(2, 1, 1, 40, 80, generator=torch.Generator().manual_seed(3))
    whole = torch.full((1, 1, 40, 80), level)
    whole[..., 40:] = other
    return (whole + noise[0]).clamp(0, 1), (whole + noise[1]).clamp(0, 1)


PAIRS = {
    "smallest": lambda: noisy((3, 1, 11, 11)),
    "one row of windows": lambda: noisy((2, 3, 11, 90)),
    "one column of windows": lambda: noisy((2, 1, 75, 11)),
    "unequal sides": lambda: noisy((2, 3, 33, 70), noise=0.4),
    "unrelated": lambda: (torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64)),
    "digits": lambda: digits(28),
    "large digits": lambda: digits(64),
    "grey photographs": lambda: photographs(256, 1),
    "colour photographs": lambda: photographs(129, 3),
    "bright and flat": lambda: flat(0.97, 0.98),
    "bright and dark": lambda: flat(0.98, 0.1),
    "bright beside dark": lambda: halves(0.02, 0.98),
    "black": lambda: (torch.zeros(1, 1, 20, 20), torch.rand(1, 1, 20, 20)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_ssim_agrees_with_a_reference_in_float64(kind):
    images, targets = PAIRS[kind]()
    found = ssim(images, targets)
    assert found.shape == (len(images),) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), reference_ssim(images, targets), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", PAIRS)
def test_ssim_agrees_with_scikit_image(kind):
    metrics = pytest.importorskip("skimage.metrics")
    images, targets = PAIRS[kind]()
    for x, y, found in zip(images.double().numpy(), targets.double().numpy(), ssim(images, targets).tolist()):
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
        _, pixels = metrics.structural_similarity(x, y, channel_axis=0, full=True, **settings)
        assert abs(found - pixels[:, 5:-5, 5:-5].mean()) < 1e-6


def test_ssim_of_constant_images_is_their_luminance():
    dark, bright = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.75)
    expected = (2 * 0.25 * 0.75 + C1) / (0.25**2 + 0.75**2 + C1)
    assert ssim(dark, bright).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", PAIRS)
def test_ssim_of_equal_images_is_exactly_1(kind):
    for images in PAIRS[kind]():
        assert ssim(images, images.clone()).eq(1).all()
        assert reconstruction_loss(images, images.clone(), 1, 1)["loss"].eq(0).all()


@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(11, 40), st.integers(11, 40)),
    noise=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_ssim_is_symmetric_at_most_1_and_of_each_image_alone(shape, noise, seed):
    images, targets = noisy(shape, noise, seed)
    found = ssim(images, targets)
    assert found.le(1).all() and found.gt(-1).all()
    torch.testing.assert_close(ssim(targets, images), found, rtol=0, atol=1e-6)
    torch.testing.assert_close(ssim(images.mT, targets.mT), found, rtol=0, atol=1e-6)
    for place in range(len(images)):
        torch.testing.assert_close(ssim(images[place, None], targets[place, None])[0], found[place], rtol=0, atol=1e-6)
    torch.testing.assert_close(ssim(images, targets, "mean"), found.mean())


@pytest.mark.parametrize(
    ("shape", "learns"),
    [
        ((1, 1, 12, 13), (True, True)),
        ((2, 1, 11, 11), (True, False)),
        ((1, 2, 11, 11), (False, True)),
        ((1, 1, 80, 12), (True, True)),
        ((2, 1, 12, 80), (True, False)),
    ],
)
def test_slopes_of_ssim_are_those_of_finite_differences(shape, learns):
    pair = [x.requires_grad_(wanted) for x, wanted in zip(noisy(shape, 0.3, dtype=torch.float64), learns)]
    assert torch.autograd.gradcheck(ssim, pair, fast_mode=max(shape) > 20)


def test_slopes_of_contrast_alone_are_those_of_finite_differences():
    pair = [x.requires_grad_() for x in noisy((1, 1, 12, 11), 0.3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x, y: losses._Dissimilarity.apply(x, y, False), pair)


def test_slopes_in_float32_are_those_of_float64():
    images, targets = photographs(96, 3)
    found, expected = (
        torch.autograd.grad(ssim(x, targets.to(x.dtype), "mean"), x)[0]
        for x in (images.requires_grad_(), images.detach().double().requires_grad_())
    )
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["equal", "constant", "black", "black and white", "smallest"])
def test_slopes_are_finite_and_of_the_images_shape(kind):
    images, targets = {
        "equal": (torch.rand(2, 3, 32, 32),) * 2,
        "constant": (torch.full((2, 3, 32, 32), 0.3),) * 2,
        "black": (torch.zeros(2, 3, 32, 32),) * 2,
        "black and white": (torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)),
        "smallest": (torch.rand(2, 3, 11, 11), torch.rand(2, 3, 11, 11)),
    }[kind]
    images = images.clone().requires_grad_()
    reconstruction_loss(images, targets, 0.5, 0.5)["loss"].mean().backward()
    assert images.grad.shape == images.shape and images.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [ssim, psnr, lambda x, y: reconstruction_loss(x, y, 0.5, 0.5)["loss"]])
def test_small_floats_are_computed_in_float32(dtype, score):
    images, targets = (x.to(dtype) for x in noisy((2, 1, 24, 24)))
    found = score(images.requires_grad_(), targets)
    wide = images.detach().float().requires_grad_()
    expected = score(wide, targets.float())
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    (slopes,), (wide_slopes,) = (torch.autograd.grad(s.sum(), x) for s, x in ((found, images), (expected, wide)))
    assert slopes.dtype == dtype and torch.equal(slopes, wide_slopes.to(dtype))


@pytest.mark.parametrize("score", [ssim, lambda x, y: reconstruction_loss(x, y, 0.5, 0.5)["loss"]])
def test_autocast_changes_nothing(score):
    images, targets = noisy((2, 1, 32, 40))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = score(images.requires_grad_(), targets)
            found.append((value, torch.autograd.grad(value.sum(), images)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_the_width_of_a_tile_changes_nothing(monkeypatch):
    images, targets = noisy((2, 1, 64, 40))
    found = []
    for tile in (1, 7, 64, 999):
        monkeypatch.setattr(losses, "TILE", tile)
        value = ssim(images.requires_grad_(), targets)
        found.append((value, torch.autograd.grad(value.sum(), images)[0]))
    for value, slopes in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(slopes, found[0][1], rtol=0, atol=1e-6)


def test_memory_format_and_gaps_change_nothing():
    images, targets = noisy((2, 3, 40, 32))
    expected = ssim(images, targets)
    assert torch.equal(ssim(images.contiguous(memory_format=torch.channels_last), targets), expected)
    assert torch.equal(ssim(F.pad(images, (3, 4))[..., 3:-4], targets), expected)


def test_no_images_have_no_scores():
    empty = torch.rand(0, 1, 20, 20, requires_grad=True)
    parts = reconstruction_loss(empty, empty.detach(), 1, 1)
    assert all(part.shape == (0,) for part in parts.values())
    parts["loss"].sum().backward()
    assert empty.grad.shape == empty.shape


SIZES = {
    ((1, 1, 10, 32), (1, 1, 10, 32)): "SSIM needs images of 11 x 11 pixels or more, these are 10 x 32",
    ((1, 1, 32, 10), (1, 1, 32, 10)): "11 x 11 pixels or more, these are 32 x 10",
    ((2, 1, 32, 32), (2, 3, 32, 32)): r"not \[2, 1, 32, 32\] and \[2, 3, 32, 32\]",
    ((32, 32), (32, 32)): r"\[B, C, H, W\] are compared, not \[32, 32\] and \[32, 32\]",
}


@pytest.mark.parametrize(("shapes", "said"), SIZES.items())
def test_sizes_that_cannot_be_compared_are_refused(shapes, said):
    with pytest.raises(ValueError, match=said):
        ssim(*(torch.rand(shape) for shape in shapes))


def test_bytes_and_unknown_reductions_are_refused():
    images = torch.rand(1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"images in \[0, 1\] are floats, these are torch.uint8"):
        ssim((images * 255).byte(), images)
    with pytest.raises(ValueError, match="reduction is none or mean, not sum"):
        ssim(images, images, "sum")


@pytest.mark.parametrize("shape", [(2, 3, 176, 192), (1, 1, 256, 176)])
def test_ms_ssim_agrees_with_a_reference(shape):
    images, targets = noisy(shape, 0.3)
    np.testing.assert_allclose(ms_ssim(images, targets), reference_ms_ssim(images, targets), rtol=0, atol=1e-5)


def test_ms_ssim_of_equal_images_is_exactly_1_at_odd_sides_too():
    images = torch.rand(2, 1, 161, 163)
    assert ms_ssim(images, images.clone()).eq(1).all()


def test_ms_ssim_refuses_images_that_are_too_small():
    images = torch.rand(1, 1, 160, 200)
    with pytest.raises(ValueError, match="needs images of 161 pixels a side or more, these are 160 x 200"):
        ms_ssim(images, images)


def test_ms_ssim_of_opposite_images_has_a_small_value_and_finite_slopes():
    # Noise, of which the coarsest scale keeps so little that its term is above 0.
    images = (0.5 * torch.rand(1, 1, 161, 161)).requires_grad_()
    value = ms_ssim(images, 0.5 - images.detach())
    value.sum().backward()
    assert 0 < value.item() < 0.1
    assert images.grad.isfinite().all() and images.grad.ne(0).any()


def test_slopes_of_ms_ssim_are_those_of_finite_differences():
    pair = [x.requires_grad_() for x in noisy((1, 1, 161, 161), 0.3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(ms_ssim, pair, fast_mode=True)


def test_psnr_is_in_decibels_and_infinite_for_equal_images():
    images = torch.full((3, 3, 4, 5), 0.5)
    targets = images.clone()
    targets[1] += 0.1
    targets[2, 0, 0, 0] += 0.3
    expected = [torch.inf, 20.0, -10 * math.log10(0.09 / 60)]
    torch.testing.assert_close(psnr(images, targets), torch.tensor(expected))


def test_mse_is_the_librarys_and_the_loss_the_weighted_sum_of_its_parts():
    images, targets = noisy((4, 3, 24, 20), 0.3)
    parts = reconstruction_loss(images, targets, alpha=0.7, beta=0.2)
    assert list(parts) == ["loss", "mse", "ssim"]
    torch.testing.assert_close(parts["mse"], torch.stack([F.mse_loss(x, y) for x, y in zip(images, targets)]))
    torch.testing.assert_close(parts["ssim"], ssim(images, targets))
    torch.testing.assert_close(parts["loss"], 0.7 * parts["mse"] + 0.2 * (1 - parts["ssim"]))


def test_slopes_of_the_loss_are_the_weighted_sum_of_those_of_its_parts():
    images, targets = noisy((2, 1, 24, 20), 0.3)
    images.requires_grad_()

    def slopes(value):
        return torch.autograd.grad(value.mean(), images)[0]

    expected = 0.7 * slopes(reconstruction_loss(images, targets)["mse"]) - 0.2 * slopes(ssim(images, targets))
    torch.testing.assert_close(slopes(reconstruction_loss(images, targets, 0.7, 0.2)["loss"]), expected)


def test_ssim_is_not_computed_unless_it_counts_or_is_wanted(monkeypatch):
    images, targets = noisy((2, 1, 24, 20))
    small, other = noisy((2, 1, 8, 8))
    assert list(reconstruction_loss(small, other)) == ["loss", "mse"]
    parts = reconstruction_loss(images.requires_grad_(), targets, with_ssim=True)
    torch.testing.assert_close(parts["ssim"], ssim(images, targets).detach())
    assert not parts["ssim"].requires_grad and torch.equal(parts["loss"], parts["mse"])
