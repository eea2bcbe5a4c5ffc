"""Balanced and bucketed orders: what each sample's share is, and that nothing else counts."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from data_modules.orders import CHUNK_BATCHES, balanced_order, bucketed_order
from data_modules.sampler import epoch_order

quick = settings(deadline=None, max_examples=100)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10**6)
length_lists = st.lists(st.integers(0, 40), max_size=300).map(lambda values: torch.tensor(values, dtype=torch.int64))


@st.composite
def label_lists(draw):
    """Return mixed labels of classes of very different sizes; class numbers may be any."""
    sizes = draw(st.lists(st.integers(1, 4) | st.integers(5, 60), min_size=1, max_size=8))
    names = draw(st.lists(st.integers(0, 2**40), min_size=len(sizes), max_size=len(sizes), unique=True))
    labels = torch.tensor(names).repeat_interleave(torch.tensor(sizes))
    return labels[epoch_order(draw(st.integers(0, 99)), 0, len(labels))]


def skewed_labels():
    """Return 1,000 labels of 7 classes: 800 of one, then ever fewer, mixed."""
    sizes = [800, 100, 50, 30, 15, 4, 1]
    labels = torch.arange(7).repeat_interleave(torch.tensor(sizes))
    return labels[epoch_order(0, 0, len(labels))]


def text_lengths(count=20_000):
    """Return lengths from 1 to 256 as texts have them: many short, few long."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (256 * uniform**3).long() + 1


def padded_tokens(order, lengths, batch_size):
    """Return how many tokens the batches hold if each is padded to its longest sample."""
    return sum(int(lengths[batch].max()) * len(batch) for batch in order.split(batch_size))


# --- balanced


@quick
@given(seeds, epochs, label_lists())
def test_classes_and_the_samples_inside_a_class_come_equally_often(seed, epoch, labels):
    order = balanced_order(seed, epoch, labels)
    assert order.dtype == torch.int64 and order.shape == labels.shape
    assert order.min() >= 0 and order.max() < len(labels)
    present = labels.unique()
    drawn = [int((labels[order] == label).sum()) for label in present]
    assert max(drawn) - min(drawn) <= 1
    times = order.bincount(minlength=len(labels))
    for label in present:
        of_class = times[labels == label]
        assert of_class.max() - of_class.min() <= 1


def test_the_one_more_goes_round():
    labels = torch.tensor([0] * 9 + [3] * 5 + [5] * 3)  # 17 draws: two of three classes get 6, one gets 5
    for seed in range(5):
        short = [labels[balanced_order(seed, epoch, labels)].bincount(minlength=6).tolist() for epoch in range(9)]
        total = torch.tensor(short).sum(0).tolist()
        assert total == [51, 0, 0, 51, 0, 51]
        assert sorted(short[0]) == [0, 0, 0, 5, 6, 6]
        assert short[0] != short[1] != short[2] != short[0]
    first = {tuple(labels[balanced_order(seed, 0, labels)].bincount().tolist()) for seed in range(20)}
    assert len(first) == 3  # where it starts is the seed's


def test_a_large_class_shows_other_samples_each_epoch_and_all_in_the_end():
    labels = skewed_labels()
    large = labels == 0
    seen = torch.zeros(len(labels), dtype=torch.bool)
    first = None
    for epoch in range(60):
        order = balanced_order(0, epoch, labels)
        mine = order[large[order]]
        assert len(mine.unique()) == len(mine) and len(mine) in (142, 143)
        assert first is None or set(mine.tolist()) != first
        first = set(mine.tolist())
        seen[mine] = True
    assert seen[large].all()


def test_each_sample_of_a_class_is_drawn_with_the_same_chance():
    labels = torch.tensor([0] * 20 + [1] * 4)
    times = torch.stack([balanced_order(3, epoch, labels).bincount(minlength=24) for epoch in range(1000)]).sum(0)
    # 12 of 20 samples an epoch: 600 in 1,000, standard deviation 15.5.
    assert (times[:20] - 600).abs().max() < 5 * 15.5
    assert times[20:].tolist() == [3000] * 4


def test_balanced_draws_are_shuffled():
    labels = skewed_labels()
    order = balanced_order(1, 0, labels)
    # Every hundred draws hold about 14 of each class, and the one sample of class 6 does not come in a row.
    for part in labels[order].split(100):
        assert part.bincount(minlength=7).min() >= 3
    assert len(set(order.tolist())) < len(order)
    repeats = (order[1:] == order[:-1]).sum()
    assert repeats < 60  # 143 draws of one sample fall next to each other about 20 times


@quick
@given(seeds, epochs, st.integers(20, 60))
def test_one_class_is_a_permutation(seed, epoch, count):
    order = balanced_order(seed, epoch, torch.full((count,), 4))
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() != list(range(count))


def test_no_labels_give_no_draws():
    order = balanced_order(0, 0, torch.zeros(0, dtype=torch.int64))
    assert order.shape == (0,) and order.dtype == torch.int64


# --- bucketed


@quick
@given(seeds, epochs, length_lists, st.integers(1, 40))
def test_bucketed_holds_every_sample_once(seed, epoch, lengths, batch_size):
    order = bucketed_order(seed, epoch, lengths, batch_size)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(len(lengths)))


@quick
@given(seeds, epochs, st.integers(0, 700), st.integers(1, 5))
def test_chunks_hold_what_the_permutation_gives_them_in_sorted_batches(seed, epoch, count, batch_size):
    lengths = epoch_order(7, 7, count) % 10
    plain = epoch_order(seed, epoch, len(lengths))
    order = bucketed_order(seed, epoch, lengths, batch_size)
    full = len(lengths) // batch_size * batch_size
    for first in range(0, full, CHUNK_BATCHES * batch_size):
        last = min(first + CHUNK_BATCHES * batch_size, full)
        expected = plain[first:last]
        expected = expected[lengths[expected].argsort(stable=True)].split(batch_size)
        found = order[first:last].split(batch_size)
        assert sorted(batch.tolist() for batch in found) == sorted(batch.tolist() for batch in expected)
    assert order[full:].tolist() == plain[full:].tolist()


def test_less_is_padded():
    lengths, batch_size = text_lengths(), 32
    tokens = int(lengths.sum())
    plain = padded_tokens(epoch_order(0, 0, len(lengths)), lengths, batch_size)
    bucketed = padded_tokens(bucketed_order(0, 0, lengths, batch_size), lengths, batch_size)
    assert plain > 3 * tokens
    assert bucketed < 1.1 * tokens


def test_batches_come_in_no_order_of_length():
    lengths, batch_size = text_lengths(16 * CHUNK_BATCHES * 4), 16
    means = lengths[bucketed_order(0, 0, lengths, batch_size)].view(4, CHUNK_BATCHES, batch_size).double().mean(2)
    for chunk in means:
        ranks = chunk.argsort().argsort().double()
        assert torch.corrcoef(torch.stack((ranks, torch.arange(len(ranks)))))[0, 1].abs() < 0.45  # 3.1 deviations
    # And the chunks are not shuffled alike.
    assert len({tuple(chunk.argsort().tolist()) for chunk in means}) == 4


def test_a_short_last_batch_holds_samples_of_any_length():
    lengths = text_lengths(1000)
    means = torch.stack([lengths[bucketed_order(seed, 0, lengths, 300)[900:]].double().mean() for seed in range(30)])
    assert abs(means.mean() - lengths.double().mean()) < 5
    assert means.std() < 12


@pytest.mark.parametrize(("count", "batch_size"), [(0, 8), (1, 8), (7, 8)])
def test_less_than_a_batch_is_the_permutation(count, batch_size):
    order = bucketed_order(5, 6, torch.arange(count), batch_size)
    assert torch.equal(order, epoch_order(5, 6, count)) and order.dtype == torch.int64


def test_equal_lengths_keep_the_batches_of_the_permutation():
    order = bucketed_order(0, 0, torch.full((100,), 9), 10)
    plain = epoch_order(0, 0, 100)
    assert order.tolist() != plain.tolist()
    assert sorted(order.view(10, 10).tolist()) == sorted(plain.view(10, 10).tolist())


# --- both


ORDERS = {
    "balanced": lambda seed, epoch: balanced_order(seed, epoch, skewed_labels()),
    "bucketed": lambda seed, epoch: bucketed_order(seed, epoch, text_lengths(1000), 10),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_other_seeds_and_epochs_differ(name):
    pairs = [(seed, epoch) for seed in (0, 1, 2, 2**32, 2**62) for epoch in range(6)]
    assert len({tuple(ORDERS[name](seed, epoch).tolist()) for seed, epoch in pairs}) == len(pairs)


@quick
@given(st.sampled_from(sorted(ORDERS)), seeds, epochs, epochs)
def test_two_epochs_differ(name, seed, one, other):
    assume(one != other)
    assert not torch.equal(ORDERS[name](seed, one), ORDERS[name](seed, other))


def test_what_repeats_in_other_epochs_is_no_pattern():
    labels, lengths = skewed_labels(), text_lengths(500)
    assert len({tuple(labels[balanced_order(0, epoch, labels)].tolist()) for epoch in range(0, 70, 7)}) == 10
    ranks = [lengths[bucketed_order(0, epoch, lengths, 10)].view(50, 10).sum(1).argsort() for epoch in range(10)]
    assert len({tuple(rank.tolist()) for rank in ranks}) == 10


ALIKE = {
    "balanced": lambda epoch: balanced_order(0, epoch, torch.tensor([1, 1, 1])),
    "bucketed": lambda epoch: bucketed_order(0, epoch, torch.tensor([1, 1, 1]), 1),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike_samples_come_in_all_orders_equally_often(name):
    found = [tuple(ALIKE[name](epoch).tolist()) for epoch in range(600)]
    assert len(set(found)) == 6
    assert stats.chisquare([found.count(order) for order in set(found)]).pvalue > 1e-3


def test_orders_are_pinned():
    # Another order here changes every run that goes on from an older checkpoint.
    balanced = balanced_order(3, 4, torch.tensor([5, 5, 2, 5, 5, 5, 9, 9]))
    assert balanced.tolist() == [4, 7, 2, 6, 0, 5, 2, 7]
    bucketed = bucketed_order(3, 4, torch.tensor([5, 1, 4, 2, 8, 6, 7, 3, 9, 0, 1]), 2)
    assert bucketed.tolist() == [9, 10, 4, 8, 0, 5, 7, 2, 1, 3, 6]


@pytest.mark.parametrize("name", ORDERS)
def test_nothing_else_counts(name):
    before = torch.get_rng_state()
    first = ORDERS[name](3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(ORDERS[name](3, 4), first)
    torch.set_rng_state(before)
