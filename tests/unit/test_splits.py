"""Normalisation is exact, batches are prepared for the device, descriptions and fingerprints tell data apart."""

import json

import pytest
import torch

from data_modules.splits import DataModule, Normalization, Split, fingerprint_tensors, measure_normalization

CPU = torch.device("cpu")


def random_images(channels, scale, num_samples=40):
    """Return uint8 images [N, C, 6, 5] whose channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(channels)
    images = torch.rand(num_samples, channels, 6, 5, generator=generator)
    low = torch.arange(channels)[:, None, None] * 0.2
    return ((low + images * (1 - low)) / scale).to(torch.uint8)


def module(images, labels, normalization=None, name="made"):
    split = Split(images, labels)
    return DataModule(name, fingerprint_tensors(images, labels), split, split, None, ["a", "b"], normalization)


@pytest.mark.parametrize("scale", [1 / 255, 1 / 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_split_has_mean_zero_and_std_one(channels, scale):
    images = random_images(channels, scale)
    normalization = measure_normalization(Split(images, torch.zeros(len(images), dtype=torch.int64)), scale)
    flat = normalization.apply(images).double().transpose(0, 1).flatten(1)
    assert normalization.apply(images).dtype == torch.float32
    assert flat.mean(1).tolist() == pytest.approx([0.0] * channels, abs=1e-6)
    assert flat.std(1, correction=0).tolist() == pytest.approx([1.0] * channels, abs=1e-6)


def test_measured_values_are_those_of_the_scaled_pixels():
    images = random_images(3, 1 / 255)
    normalization = measure_normalization(Split(images, torch.zeros(len(images), dtype=torch.int64)), 1 / 255)
    flat = images.double().transpose(0, 1).flatten(1) / 255
    assert normalization.mean == pytest.approx(flat.mean(1).tolist(), rel=1e-6)
    assert normalization.std == pytest.approx(flat.std(1, correction=0).tolist(), rel=1e-6)


def test_constant_channel_becomes_zero():
    images = random_images(2, 1 / 255)
    images[:, 1] = 77
    normalization = measure_normalization(Split(images, torch.zeros(len(images), dtype=torch.int64)), 1 / 255)
    assert normalization.std[1] == 1.0
    assert normalization.apply(images)[:, 1].abs().max() < 1e-6


def test_apply_is_the_formula():
    images = torch.tensor([[[[0, 51]], [[102, 255]]]], dtype=torch.uint8)
    given = Normalization(1 / 255, (0.5, 0.25), (0.5, 2.0)).apply(images)
    assert given.flatten().tolist() == pytest.approx([-1.0, -0.6, 0.075, 0.375], abs=1e-6)


def test_gather_returns_samples_with_their_own_labels():
    images, labels = random_images(1, 1 / 255), torch.arange(40)
    batch = Split(images, labels).gather(torch.tensor([7, 3, 7]))
    assert batch["labels"].tolist() == [7, 3, 7]
    assert torch.equal(batch["inputs"], images[[7, 3, 7]])


def test_prepare_normalises_images_and_leaves_labels_and_points_alone():
    images, labels = random_images(1, 1 / 255), torch.arange(40)
    normalization = Normalization(1 / 255, (0.1307,), (0.3081,))
    stored = Split(images, labels).gather(torch.tensor([1, 2]))
    prepared = module(images, labels, normalization).prepare(stored, CPU)
    assert torch.allclose(prepared["inputs"], (images[[1, 2]] / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert prepared["labels"].tolist() == [1, 2]
    assert stored["inputs"].dtype == torch.uint8  # what was passed in is not changed
    points = torch.randn(4, 2)
    assert torch.equal(module(points, labels[:4]).prepare({"inputs": points}, CPU)["inputs"], points)


def test_description_is_plain_json():
    images, labels = random_images(3, 1 / 255), torch.arange(40) % 2
    described = module(images, labels, Normalization(1 / 255, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))).describe()
    read = json.loads(json.dumps(described, allow_nan=False))
    assert read["input_shape"] == [3, 6, 5]
    assert read["samples"] == {"train": 40, "validation": 40}
    assert read["class_names"] == ["a", "b"]
    assert read["normalization"] == {"scale": 1 / 255, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}


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
