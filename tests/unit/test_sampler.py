"""Every sample once an epoch, in an order that knows nothing of the number of processes."""

from dataclasses import dataclass

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_modules.sampler import BatchSampler, epoch_order, evaluation_shares


@dataclass(frozen=True)
class Case:
    """A split, how its batches are cut, and where in which epoch."""

    num_samples: int
    batch_size: int
    slots: int
    processes: int
    seed: int
    epoch: int
    start: int  # at the border of a batch, the end of the epoch included

    def order(self, epoch):
        """Return the order of an epoch."""
        return epoch_order(self.seed, epoch, self.num_samples)

    def shares(self, processes, start=0):
        """Return, for each process, its batches as (size, [(slot, count, indices)])."""
        return [
            [
                (plan.size, [(slot.number, slot.count, slot.indices.tolist()) for slot in plan.slots])
                for plan in BatchSampler(
                    self.order, self.num_samples, self.batch_size, self.slots, rank, processes
                ).batches(self.epoch, start)
            ]
            for rank in range(processes)
        ]

    def batches(self, processes, start=0):
        """Return the global batches as (size, [(slot, count, indices)]), put together from all processes."""
        together = []
        for parts in zip(*self.shares(processes, start), strict=True):
            assert len({size for size, _ in parts}) == 1
            together.append((parts[0][0], [slot for _, slots in parts for slot in slots]))
        return together


@st.composite
def cases(draw):
    processes, accumulation = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    num_samples, batch_size = draw(st.integers(1, 150)), draw(st.integers(1, 60))
    start = batch_size * draw(st.integers(0, -(-num_samples // batch_size)))
    seed, epoch = draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 1000))
    return Case(num_samples, batch_size, processes * accumulation, processes, seed, epoch, start)


quick = settings(deadline=None, max_examples=80)  # the clock of a shared machine proves nothing


@quick
@given(cases())
def test_every_sample_comes_exactly_once_an_epoch(case):
    seen = [
        index
        for share in case.shares(case.processes)
        for _, slots in share
        for _, count, indices in slots
        for index in indices[:count]
    ]
    assert sorted(seen) == list(range(case.num_samples))


@quick
@given(cases())
def test_batches_are_full_up_to_the_last_and_follow_the_order(case):
    batches = case.batches(case.processes)
    order = epoch_order(case.seed, case.epoch, case.num_samples).tolist()
    for number, (size, slots) in enumerate(batches):
        expected = order[number * case.batch_size : (number + 1) * case.batch_size]
        assert [index for _, count, indices in slots for index in indices[:count]] == expected
        assert size == len(expected)
        assert size == case.batch_size or number == len(batches) - 1


def test_any_order_is_taken_as_it_is():
    asked = []

    def order(epoch):
        asked.append(epoch)
        return torch.tensor([4, 0, 4, 2, 1])  # a balanced order repeats samples and leaves others out

    plans = list(BatchSampler(order, 5, 2, 1, 0, 1).batches(7, 2))
    assert [plan.slots[0].indices.tolist() for plan in plans] == [[4, 2], [1]]
    assert asked == [7]  # once an epoch: it may be dear


@quick
@given(cases())
def test_order_and_slots_do_not_depend_on_the_number_of_processes(case):
    alone = case.batches(1)
    for processes in range(2, case.slots + 1):
        if case.slots % processes == 0:
            assert case.batches(processes) == alone


@quick
@given(cases())
def test_each_process_has_its_slots_in_every_batch(case):
    each = case.slots // case.processes
    for rank, share in enumerate(case.shares(case.processes)):
        for _, slots in share:
            assert [number for number, _, _ in slots] == list(range(rank * each, (rank + 1) * each))


@quick
@given(cases())
def test_resuming_gives_the_tail(case):
    whole = case.shares(case.processes)
    assert case.shares(case.processes, case.start) == [share[case.start // case.batch_size :] for share in whole]


@quick
@given(cases())
def test_slots_are_even_and_fillers_have_count_zero(case):
    for size, slots in case.batches(case.processes):
        counts = [count for _, count, _ in slots]
        assert max(counts) - min(counts) <= 1
        assert counts[0] == max(counts)  # batch norm's averages are those of slot 0
        for _, count, indices in slots:
            assert len(indices) == max(1, count)
            assert all(0 <= index < case.num_samples for index in indices)
        assert sum(counts) == size


def test_a_batch_smaller_than_the_slots_has_fillers():
    slots = [slot for _, slots in Case(2, 2, 4, 2, 0, 0, 0).batches(2) for slot in slots]
    assert [count for _, count, _ in slots] == [1, 0, 1, 0]


@quick
@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(0, 1000), st.integers(20, 100))
def test_two_epochs_differ(seed, one, other, num_samples):
    assume(one != other)  # the chance that two orders of 20 samples are equal is 1 in 10**18
    assert not torch.equal(epoch_order(seed, one, num_samples), epoch_order(seed, other, num_samples))


def test_neighbouring_seeds_share_no_epoch():
    orders = {tuple(epoch_order(seed, epoch, 20).tolist()) for seed in range(30) for epoch in range(30)}
    assert len(orders) == 900


def test_order_is_the_same_each_time_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first = epoch_order(3, 4, 50)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(epoch_order(3, 4, 50), first)


@quick
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 9))
def test_evaluation_counts_every_sample_once_in_equally_many_batches(num_samples, batch_size, processes):
    all_shares = [evaluation_shares(num_samples, batch_size, rank, processes) for rank in range(processes)]
    assert len({len(shares) for shares in all_shares}) == 1
    counted = []
    for shares in all_shares:
        assert [share.number for share in shares] == list(range(len(shares)))
        for share in shares:
            assert share.count <= batch_size
            assert len(share.indices) == max(1, share.count)
            assert share.indices.dtype == torch.int64
            assert share.indices.min() >= 0 and share.indices.max() < num_samples
            counted += share.indices[: share.count].tolist()
    assert sorted(counted) == list(range(num_samples))
    # No more forward passes than the largest share takes.
    assert len(all_shares[0]) == -(-max(sum(share.count for share in shares) for shares in all_shares) // batch_size)
