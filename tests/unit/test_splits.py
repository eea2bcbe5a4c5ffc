"""Normalisation is exact, batches are prepared for the device, descriptions and fingerprints tell data apart."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.splits import (
    Arrays,
    DataModule,
    InputSpec,
    Normalization,
    Split,
    fingerprint_tensors,
    measure_moments,
    measure_normalization,
)

CPU = torch.device("cpu")


def random_images(channels, scale, num_samples=40):
    """Return uint8 images [N, C, 6, 5] whose channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(channels)
    images = torch.rand(num_samples, channels, 6, 5, generator=generator)
    low = torch.arange(channels)[:, None, None] * 0.2
    return ((low + images * (1 - low)) / scale).to(torch.uint8)


def measure(images, scale):
    moments = torch.from_numpy(measure_moments(images.numpy()))
    return measure_normalization(moments, images[0, 0].numel(), scale)


def split_of(inputs, labels, rows=None):
    return Split(Arrays({"inputs": inputs}), labels, rows)


def module(images, labels, normalization=None, name="made", task="image"):
    split = split_of(images, labels)
    inputs = InputSpec(task, tuple(images.shape[1:]))
    checksum = fingerprint_tensors(images, labels)
    return DataModule(name, checksum, inputs, split, split, None, ["a", "b"], normalization)


@pytest.mark.parametrize("scale", [1 / 255, 1 / 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_split_has_mean_zero_and_std_one(channels, scale):
    images = random_images(channels, scale)
    normalization = measure(images, scale)
    flat = normalization.apply(images).double().transpose(0, 1).flatten(1)
    assert normalization.apply(images).dtype == torch.float32
    assert flat.mean(1).tolist() == pytest.approx([0.0] * channels, abs=1e-6)
    assert flat.std(1, correction=0).tolist() == pytest.approx([1.0] * channels, abs=1e-6)


def test_measured_values_are_those_of_the_scaled_pixels():
    images = random_images(3, 1 / 255)
    normalization = measure(images, 1 / 255)
    flat = images.double().transpose(0, 1).flatten(1) / 255
    assert normalization.mean == pytest.approx(flat.mean(1).tolist(), rel=0, abs=1e-12)
    assert normalization.std == pytest.approx(flat.std(1, correction=0).tolist(), rel=0, abs=1e-12)


def test_moments_do_not_overflow_and_a_tiny_spread_is_not_lost():
    white = np.full((1, 1, 600, 600), 255, np.uint8)
    assert measure_moments(white).tolist() == [[[255 * 360_000, 255**2 * 360_000]]]
    # Ten thousand millions of pixels, one of which is 254: subtracting two floats would leave noise.
    count = 10**10
    moments = torch.tensor([[[255 * count - 1, 255**2 * count - 255**2 + 254**2]]])
    normalization = measure_normalization(moments, count, 1.0)
    assert normalization.std == pytest.approx([1e-5], rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 4), st.randoms(use_true_random=False))
def test_moments_of_parts_add_up(num_samples, channels, random):
    pixels = np.frombuffer(random.randbytes(num_samples * channels * 6), np.uint8).reshape(num_samples, channels, 2, 3)
    moments = measure_moments(pixels)
    assert moments.shape == (num_samples, channels, 2) and moments.dtype == np.int64
    parts = [measure_moments(pixels[number : number + 1]) for number in range(num_samples)]
    assert np.array_equal(moments, np.concatenate(parts))


def test_constant_channel_becomes_zero():
    images = random_images(2, 1 / 255)
    images[:, 1] = 77
    normalization = measure(images, 1 / 255)
    assert normalization.std[1] == 1.0
    assert normalization.apply(images)[:, 1].abs().max() < 1e-6


def test_apply_is_the_formula():
    images = torch.tensor([[[[0, 51]], [[102, 255]]]], dtype=torch.uint8)
    given = Normalization(1 / 255, (0.5, 0.25), (0.5, 2.0)).apply(images)
    assert given.flatten().tolist() == pytest.approx([-1.0, -0.6, 0.075, 0.375], abs=1e-6)


def test_gather_returns_samples_with_their_own_labels():
    images, labels = random_images(1, 1 / 255), torch.arange(40)
    batch = split_of(images, labels).gather(torch.tensor([7, 3, 7]))
    assert batch["labels"].tolist() == [7, 3, 7]
    assert torch.equal(batch["inputs"], images[[7, 3, 7]])


def test_a_part_of_the_samples_keeps_samples_and_labels_together():
    images, rows = random_images(1, 1 / 255), torch.tensor([30, 2, 11])
    split = split_of(images, torch.tensor([300, 20, 110]), rows)
    assert len(split) == 3
    batch = split.gather(torch.tensor([2, 0]))
    assert batch["labels"].tolist() == [110, 300]
    assert torch.equal(batch["inputs"], images[[11, 30]])


def test_prepare_normalises_images_and_leaves_labels_and_points_alone():
    images, labels = random_images(1, 1 / 255), torch.arange(40)
    normalization = Normalization(1 / 255, (0.1307,), (0.3081,))
    stored = split_of(images, labels).gather(torch.tensor([1, 2]))
    prepared = module(images, labels, normalization).prepare(stored, CPU)
    assert torch.allclose(prepared["inputs"], (images[[1, 2]] / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert prepared["labels"].tolist() == [1, 2]
    assert stored["inputs"].dtype == torch.uint8  # what was passed in is not changed
    points = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    data = module(points, labels[:4], task="points")
    assert torch.equal(data.prepare({"inputs": points}, CPU)["inputs"], points)


def test_description_is_plain_json():
    images, labels = random_images(3, 1 / 255), torch.arange(40) % 2
    described = module(images, labels, Normalization(1 / 255, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))).describe()
    read = json.loads(json.dumps(described, allow_nan=False))
    sizes = {"vocabulary_size": 0, "max_length": 0, "category_sizes": []}
    assert read["inputs"] == {"task": "image", "shape": [3, 6, 5], **sizes}
    assert read["samples"] == {"train": 40, "validation": 40}
    assert read["class_names"] == ["a", "b"]
    assert read["normalization"] == {"scale": 1 / 255, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}


def test_what_a_model_takes_is_named_and_told():
    assert InputSpec("image", (3, 4, 6)).names == InputSpec("points", (2,)).names == ("inputs",)
    assert InputSpec("text", vocabulary_size=1000).names == ("tokens", "lengths")
    assert InputSpec("table", (3,), category_sizes=(2, 5)).names == ("numbers", "categories")
    assert str(InputSpec("image", (3, 4, 6))) == "image of shape (3, 4, 6)"
    assert str(InputSpec("text", vocabulary_size=1000)) == "text of 1,000 different tokens"
    assert str(InputSpec("table", (3,), category_sizes=(2, 5))) == "3 numbers and 2 categories"


def test_fingerprint_changes_with_any_value_type_shape_or_order():
    images, labels = random_images(1, 1 / 255), torch.arange(40) % 2
    pixel, label = images.clone(), labels.clone()
    pixel[-1, 0, -1, -1] += 1
    label[20] = 1 - label[20]
    variants = [
        (images, labels),
        (pixel, labels),
        (images, label),
        (images.flip(0), labels),
        (images.reshape(40, 1, 5, 6), labels),
        (images.view(torch.int8), labels),
        (labels, images),
        (images,),
    ]
    assert len({fingerprint_tensors(*variant) for variant in variants}) == len(variants)
    assert fingerprint_tensors(images.clone(), labels.clone()) == fingerprint_tensors(images, labels)


def test_fingerprint_does_not_depend_on_the_layout_in_memory():
    images = random_images(3, 1 / 255)
    assert fingerprint_tensors(images.to(memory_format=torch.channels_last)) == fingerprint_tensors(images)


def test_fingerprint_of_arrays_covers_all_of_them_and_not_their_order():
    one, other = torch.arange(4), torch.arange(4) * 2
    first = Arrays({"tokens": one, "lengths": other})
    assert len(first) == 4
    assert Arrays({"lengths": other, "tokens": one}).fingerprint() == first.fingerprint()
    assert Arrays({"tokens": other, "lengths": one}).fingerprint() != first.fingerprint()
    assert Arrays({"tokens": one}).fingerprint() != first.fingerprint()
