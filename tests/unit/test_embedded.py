"""The data sets that need no network are what they claim to be."""

import json
from collections import Counter

import numpy as np
import pytest
import sklearn.datasets
import torch

from data_modules import embedded
from data_modules.splits import InputSpec


@pytest.fixture(scope="module")
def digits():
    return embedded.load_digits()


@pytest.fixture(scope="module")
def blobs():
    return embedded.load_blobs()


def inputs_of(split):
    """Return all samples of a split."""
    return split.gather(torch.arange(len(split)))["inputs"]


def contents(inputs, labels):
    return Counter((image.numpy().tobytes(), int(label)) for image, label in zip(inputs, labels))


def test_digits_have_their_sizes_types_and_classes(digits):
    assert {name: len(split) for name, split in digits.splits().items()} == {
        "train": 1259,
        "validation": 269,
        "test": 269,
    }
    assert digits.class_names == [str(number) for number in range(10)]
    assert digits.inputs == InputSpec("image", (1, 8, 8))
    for split in digits.splits().values():
        assert inputs_of(split).dtype == torch.uint8 and int(inputs_of(split).max()) == 16
        assert split.labels.dtype == torch.int64
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert 0.09 < float(shares.min()) <= float(shares.max()) < 0.11


def test_each_scan_is_in_exactly_one_split_with_its_label(digits):
    bunch = sklearn.datasets.load_digits()
    whole = contents(torch.tensor(bunch.images, dtype=torch.uint8), bunch.target)
    parts = sum((contents(inputs_of(split), split.labels) for split in digits.splits().values()), Counter())
    assert parts == whole  # counted, so that a scan that exists twice may be in two splits


def test_digits_are_normalised_by_the_training_split(digits):
    prepared = digits.prepare({"inputs": inputs_of(digits.train)}, torch.device("cpu"))["inputs"]
    assert float(prepared.mean()) == pytest.approx(0, abs=1e-5)
    assert float(prepared.std()) == pytest.approx(1, abs=1e-3)
    assert digits.normalization.scale == 1 / 16


def test_blobs_have_the_promised_sizes_centres_and_spread(blobs):
    for split, per_class in ((blobs.train, 1000), (blobs.validation, 200), (blobs.test, 200)):
        assert inputs_of(split).shape == (2 * per_class, 2) and inputs_of(split).dtype == torch.float32
        assert torch.bincount(split.labels).tolist() == [per_class, per_class]
        for label, centre in enumerate([(-2.5, 0.0), (2.5, 0.0)]):
            points = inputs_of(split)[split.labels == label]
            error = 4 / per_class**0.5  # four standard errors of the mean
            assert points.mean(0).tolist() == pytest.approx(centre, abs=error)
            assert points.std(0).tolist() == pytest.approx([1.0, 1.0], abs=error)
    assert blobs.inputs == InputSpec("points", (2,))
    assert len(blobs.class_names) == 2
    assert blobs.normalization is None


def test_no_point_is_in_two_splits(blobs):
    points = torch.cat([inputs_of(split) for split in blobs.splits().values()])
    assert len(points.unique(dim=0)) == len(points) == 2800


@pytest.mark.parametrize("load", [embedded.load_digits, embedded.load_blobs])
def test_data_is_the_same_for_every_seed_and_shifts_no_randomness(load):
    torch.manual_seed(1)
    first = load()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = load()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.describe() == second.describe()
    assert torch.equal(inputs_of(first.train), inputs_of(second.train))


@pytest.mark.parametrize("load", [embedded.load_digits, embedded.load_blobs])
def test_description_is_plain_json(load):
    described = load().describe()
    assert json.loads(json.dumps(described))["fingerprint"] == described["fingerprint"]


def test_fingerprint_of_digits_changes_with_one_label(monkeypatch, digits):
    read = np.loadtxt

    def read_with_another_label(*arguments, **options):
        table = read(*arguments, **options)
        table[5, 64] = (table[5, 64] + 1) % 10
        return table

    labels = torch.tensor(sklearn.datasets.load_digits().target)
    parts = embedded.stratified_parts(labels, (0.70, 0.15, 0.15), embedded.SPLIT_SEED)
    monkeypatch.setattr(embedded.np, "loadtxt", read_with_another_label)
    monkeypatch.setattr(embedded, "stratified_parts", lambda *_: parts)  # the cut alone must not give it away
    assert embedded.load_digits().fingerprint != digits.fingerprint


def test_fingerprint_of_digits_changes_with_the_cut(monkeypatch, digits):
    monkeypatch.setattr(embedded, "SPLIT_SEED", 1)
    assert embedded.load_digits().fingerprint != digits.fingerprint


def test_fingerprint_of_blobs_covers_points_and_labels(monkeypatch, blobs):
    seen = []
    monkeypatch.setattr(embedded, "fingerprint_tensors", lambda *tensors: seen.extend(tensors) or "")
    embedded.load_blobs()
    splits = [blobs.train, blobs.validation]
    expected = [tensor for split in splits for tensor in (inputs_of(split), split.labels)]
    assert len(seen) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(seen, expected))
