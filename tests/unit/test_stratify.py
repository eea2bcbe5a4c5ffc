"""Parts cover all samples once and hold the same share of every class."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.stratify import class_weights, stratified_parts

FRACTIONS = [(0.9, 0.1), (0.7, 0.15, 0.15), (0.1, 0.9), (0.2, 0.4, 0.4), (0.02, 0.49, 0.49), (1.0,)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.sampled_from(FRACTIONS), st.integers(0, 2**63 - 1))
def test_parts_hold_every_sample_once_and_every_class_in_its_share(values, fractions, seed):
    labels = torch.tensor(values)
    parts = stratified_parts(labels, fractions, seed)
    assert len(parts) == len(fractions)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(values)))
    for part in parts:
        assert part.dtype == torch.int64
        assert part.tolist() == sorted(part.tolist())
    for label in set(values):
        members = values.count(label)
        counts = [int((labels[part] == label).sum()) for part in parts]
        for count, fraction in zip(counts, fractions):
            assert abs(count - fraction * members) <= len(fractions)
        if members >= len(fractions):
            assert min(counts) >= 1


def test_shares_of_large_classes_are_right_to_the_sample():
    labels = torch.tensor([0] * 200 + [1] * 1000)
    sizes = [torch.bincount(labels[part]).tolist() for part in stratified_parts(labels, (0.7, 0.2, 0.1), 0)]
    assert sizes == [[140, 700], [40, 200], [20, 100]]


def test_cut_is_shuffled_and_fixed_by_the_seed():
    labels = torch.arange(100) % 2
    first, second = stratified_parts(labels, (0.5, 0.5), 0)
    assert first.tolist() != list(range(50))
    before = torch.get_rng_state()
    assert torch.equal(stratified_parts(labels, (0.5, 0.5), 0)[1], second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(stratified_parts(labels, (0.5, 0.5), 1)[1], second)


def test_fractions_must_add_up_to_one():
    with pytest.raises(AssertionError):
        stratified_parts(torch.zeros(10, dtype=torch.int64), (0.5, 0.4), 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(5, 8))
def test_weights_even_classes_out_and_are_one_on_average(values, num_classes):
    labels = torch.tensor(values)
    weights = class_weights(labels, num_classes)
    assert weights.shape == (num_classes,) and weights.dtype == torch.float32
    assert float(weights[labels].double().mean()) == pytest.approx(1, rel=1e-5)
    totals = {round(float(weights[label]) * values.count(label), 3) for label in set(values)}
    assert max(totals) - min(totals) <= 0.002
    absent = [number for number in range(num_classes) if number not in values]
    assert weights[absent].eq(0).all()


def test_weights_are_inverse_to_the_frequency():
    assert class_weights(torch.tensor([0, 0, 0, 2]), 3).tolist() == pytest.approx([2 / 3, 0.0, 2.0])
