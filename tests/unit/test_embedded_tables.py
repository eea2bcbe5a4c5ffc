"""The tables that need no network are what they claim to be."""

import json

import pytest
import sklearn.datasets
import torch

from data_modules import embedded_tables
from data_modules.splits import InputSpec
from data_modules.stratify import stratified_parts

CASES = {
    "breast_cancer": (embedded_tables.load_breast_cancer, (397, 86, 86), 30, ["malignant", "benign"]),
    "wine": (embedded_tables.load_wine, (124, 27, 27), 13, ["class_0", "class_1", "class_2"]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Return the data, what is promised of it, and scikit-learn's."""
    load, sizes, width, class_names = CASES[request.param]
    return load(), sizes, width, class_names, getattr(sklearn.datasets, f"load_{request.param}")()


def test_tables_have_their_sizes_types_and_classes(case):
    data, sizes, width, class_names, bunch = case
    assert data.inputs == InputSpec("table", (width,))
    assert data.class_names == class_names == list(bunch.target_names)
    assert tuple(len(split) for split in data.splits().values()) == sizes
    assert sum(sizes) == len(bunch.target)
    shares = torch.bincount(torch.tensor(bunch.target)) / len(bunch.target)
    for split in data.splits().values():
        batch = split.gather(torch.arange(len(split)))
        assert batch["numbers"].shape == (len(split), width) and batch["numbers"].dtype == torch.float32
        assert batch["categories"].shape == (len(split), 0)
        assert torch.equal(batch["labels"], split.labels)
        # No class is off by more than one sample of the split.
        assert (torch.bincount(split.labels) - shares * len(split)).abs().max() <= 1


def test_each_row_is_in_exactly_one_split_with_its_label(case):
    data, *_, bunch = case
    rows = torch.cat([split.rows for split in data.splits().values()])
    labels = torch.cat([split.labels for split in data.splits().values()])
    assert sorted(rows.tolist()) == list(range(len(bunch.target)))
    assert labels.tolist() == bunch.target[rows].tolist()


def test_numbers_are_those_of_the_bunch_standardised_by_the_training_split(case):
    data, *_, bunch = case
    train = bunch.data[data.train.rows]
    assert [column.name for column in data.preprocessing.numbers] == list(bunch.feature_names)
    for split in data.splits().values():
        expected = torch.tensor((bunch.data[split.rows] - train.mean(0)) / train.std(0)).float()
        assert torch.allclose(split.gather(torch.arange(len(split)))["numbers"], expected, rtol=1e-5, atol=1e-6)
    assert data.normalization is None
    assert data.notes == [] and data.skipped == []


def test_the_cut_is_that_of_the_digits(case):
    data, *_, bunch = case
    parts = stratified_parts(torch.tensor(bunch.target), (0.70, 0.15, 0.15), 0)
    for split, part in zip(data.splits().values(), parts, strict=True):
        assert torch.equal(split.rows, part)


@pytest.mark.parametrize("name", CASES)
def test_data_is_the_same_each_time_and_shifts_no_randomness(name):
    load = CASES[name][0]
    torch.manual_seed(1)
    first = load()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = load()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.describe() == second.describe()
    assert first.train.samples.fingerprint() == second.train.samples.fingerprint()


def test_descriptions_are_plain_json(case):
    data, *_ = case
    assert json.loads(json.dumps(data.describe()))["fingerprint"] == data.fingerprint
    described = data.preprocessing.describe()
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize("changed", ["sample", "label", "cut"])
def test_fingerprint_covers_samples_labels_and_cut(monkeypatch, changed):
    data = embedded_tables.load_wine()
    bunch = sklearn.datasets.load_wine()
    parts = [split.rows.clone() for split in data.splits().values()]
    if changed == "sample":
        bunch.data[int(parts[1][0]), 4] += 1  # of the validation split: the statistics stay
    elif changed == "label":
        bunch.target[5] = 2
    else:
        parts[0][-1], parts[1][0] = int(parts[1][0]), int(parts[0][-1])
    monkeypatch.setattr(sklearn.datasets, "load_wine", lambda: bunch)
    # The cut or the statistics alone must not give it away.
    monkeypatch.setattr(embedded_tables, "stratified_parts", lambda *_: parts)
    monkeypatch.setattr(embedded_tables, "fit_table", lambda *_: (data.preprocessing, []))
    assert embedded_tables.load_wine().fingerprint != data.fingerprint


def test_a_bad_row_is_named(monkeypatch):
    bunch = sklearn.datasets.load_wine()
    bunch.data[5, 2] = float("nan")
    monkeypatch.setattr(sklearn.datasets, "load_wine", lambda: bunch)
    with pytest.raises(ValueError, match=r"^wine, row 5: column 'ash' is nan"):
        embedded_tables.load_wine()
