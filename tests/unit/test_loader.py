"""Batches of a split: the samples that the sampler names, changed and normalised, however many come at a time."""

from functools import partial

import pytest
import torch

from data_modules import loader
from data_modules.augmentation import Augmentation
from data_modules.sampler import epoch_order
from data_modules.splits import Arrays, DataModule, InputSpec, Normalization, Split
from data_modules.training_loader import build_training_loader

SIZE, PIXELS = 101, 9
NORMALIZATION = Normalization(1 / 255, (0.4,), (0.2,))
EVERYTHING = Augmentation(crop=2, flip=True, rotate=9, scale=0.1, cutout=3, mixup=0.5)


@pytest.fixture(scope="module")
def data():
    """Images of 9 x 9 pixels, an odd number of bytes, in a part of a larger set."""
    images = torch.randint(0, 256, (SIZE + 20, 1, PIXELS, PIXELS), generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(SIZE + 20, generator=torch.Generator().manual_seed(1))[:SIZE]
    split = Split(Arrays({"inputs": images.to(torch.uint8)}), rows % 7, rows)
    return DataModule(
        "x", "", InputSpec("image", (1, PIXELS, PIXELS)), split, split, None, list("abcdefg"), NORMALIZATION
    )


def build(data, batch_size=8, slots=2, rank=0, processes=1, augmentation=EVERYTHING, device="cpu", **more):
    settings = {"num_workers": 0, "seed": 5, "balanced": False, "place": None, "remember": lambda place: None, **more}
    return build_training_loader(
        data, batch_size=batch_size, num_slots=slots, rank=rank, num_processes=processes, device=torch.device(device),
        augmentation=augmentation, **settings,
    )  # fmt: skip


def slots_of(feed, epoch=0, start=0):
    """Return (size of the batch, number, count, tensors) of every slot."""
    return [
        (batch.size, slot.number, slot.count, slot.batch)
        for batch in feed.batches(epoch, start)
        for slot in batch.slots
    ]


def same(one, other):
    assert [part[:3] for part in one] == [part[:3] for part in other]
    return all(torch.equal(a[3][name], b[3][name]) for a, b in zip(one, other) for name in a[3])


def test_plain_batches_are_the_normalised_samples_of_the_order(data):
    order = epoch_order(5, 0, SIZE)
    images = torch.cat(
        [batch["inputs"][:count] for _, _, count, batch in slots_of(build(data, augmentation=Augmentation()))]
    )
    labels = torch.cat(
        [batch["labels"][:count] for _, _, count, batch in slots_of(build(data, augmentation=Augmentation()))]
    )
    stored = data.train.gather(order)
    assert torch.equal(labels, stored["labels"])
    assert torch.allclose(images, (stored["inputs"] / 255 - 0.4) / 0.2, atol=1e-5)


@pytest.mark.parametrize("augmentation", [Augmentation(), EVERYTHING])
@pytest.mark.parametrize("at_once", [1, 24, 512])
def test_gathering_several_batches_at_once_changes_no_bit(data, monkeypatch, at_once, augmentation):
    expected = slots_of(build(data, augmentation=augmentation))
    monkeypatch.setattr(loader, "AT_ONCE", at_once)
    assert build(data)._batches_at_once() == max(1, at_once // 8)
    assert same(slots_of(build(data, augmentation=augmentation)), expected)
    assert same(slots_of(build(data, augmentation=augmentation), start=32), expected[8:])


def test_every_tensor_is_aligned(data):
    """9 x 9 floats are 324 bytes: every second slot would begin in the middle of a line of the cache."""
    for _, _, _, batch in slots_of(build(data)):
        assert all(tensor.data_ptr() % loader.ALIGNMENT == 0 and tensor.is_contiguous() for tensor in batch.values())


def test_many_samples_come_at_once_only_where_they_are_small(data):
    large = DataModule("x", "", InputSpec("image", (3, 224, 224)), data.train, data.train, None, ["a"])
    text = DataModule("x", "", InputSpec("text", vocabulary_size=9), data.train, data.train, None, ["a"])
    plain = {"augmentation": Augmentation(), "slots": 1}
    order = partial(epoch_order, 0, num_samples=SIZE)
    for module, expected in ((data, 64), (large, 1), (text, 1)):
        sampler = loader.BatchSampler(order, SIZE, 8, 1, 0, 1)
        assert loader.TrainingLoader(module, sampler, torch.device("cpu"))._batches_at_once() == expected
    assert build(data, batch_size=1024, **plain)._batches_at_once() == 1


def test_each_sample_is_changed_by_its_number_alone(data):
    """Another cut of the epoch, or other processes, and each sample is the same to the last bit."""

    def by_label_and_weight(slots):
        return {
            (int(label), float(weight)): image
            for _, _, count, batch in slots
            for label, weight, image in zip(batch["labels"][:count], batch["weights"], batch["inputs"])
        }

    whole = by_label_and_weight(slots_of(build(data)))
    assert len(whole) == SIZE
    cut = by_label_and_weight(slots_of(build(data, batch_size=24, slots=3)))
    shared = {}
    for rank in range(2):
        shared |= by_label_and_weight(slots_of(build(data, rank=rank, processes=2)))
    for other in (cut, shared):
        assert other.keys() == whole.keys()
        assert all(torch.equal(other[key], whole[key]) for key in whole)


def test_epochs_and_seeds_differ(data):
    one = build(data, batch_size=SIZE, slots=1)
    other = build(data, batch_size=SIZE, slots=1, seed=6)
    draws = [slots_of(one)[0][3], slots_of(one, epoch=1)[0][3], slots_of(other)[0][3]]
    for position, draw in enumerate(draws):
        for another in draws[position + 1 :]:
            assert len(set(draw["weights"].tolist()) & set(another["weights"].tolist())) < SIZE / 2


def test_mixed_samples_are_the_weighted_sums_of_two(data):
    """The labels of both are given, and the weight of the first. Each was changed by its own number."""
    mixing = Augmentation(crop=2, mixup=0.5)
    order = epoch_order(5, 0, SIZE)
    batch = slots_of(build(data, batch_size=SIZE, slots=1, augmentation=mixing))[0][3]
    partners = mixing.partners(order, 0, 5, SIZE)
    first, second = data.train.gather(order), data.train.gather(partners)
    assert torch.equal(batch["labels"], first["labels"]) and torch.equal(batch["partner_labels"], second["labels"])
    weights = batch["weights"][:, None, None, None]
    one, other = (
        NORMALIZATION.apply(mixing.pixels(batch["inputs"], numbers, 0, 5))
        for batch, numbers in ((first, order), (second, partners))
    )
    expected = weights * one + (1 - weights) * other
    assert torch.allclose(batch["inputs"], expected, atol=1e-5)
    assert "partner_inputs" not in batch


def test_cutout_sets_a_square_to_the_mean(data):
    plain = slots_of(build(data, batch_size=SIZE, slots=1, augmentation=Augmentation()))[0][3]["inputs"]
    cut = slots_of(build(data, batch_size=SIZE, slots=1, augmentation=Augmentation(cutout=3)))[0][3]["inputs"]
    changed = plain != cut
    assert (cut[changed] == 0).all()
    assert (changed.sum(dim=(1, 2, 3)) <= 9).all() and changed.sum() > 5 * SIZE


def test_a_block_of_a_stream_draws_by_the_numbers_of_its_samples(data):
    """Sample 3 of a block that begins at 1,000 is sample 1,003."""
    mixing = Augmentation(mixup=0.5)
    order = partial(epoch_order, 5, num_samples=SIZE)
    sampler = loader.BatchSampler(order, SIZE, SIZE, 1, 0, 1)
    block = loader.TrainingLoader(data, sampler, torch.device("cpu"), 0, mixing, 5, first_index=1000)
    assert torch.equal(slots_of(block)[0][3]["weights"], mixing.mix_weights(order(0) + 1000, 0, 5))


def test_fillers_are_no_samples(data):
    """Slots of the short last batch that get no sample hold one with count 0."""
    slots = slots_of(build(data, slots=8))
    assert sum(count for _, _, count, _ in slots) == SIZE
    fillers = [batch for _, _, count, batch in slots if count == 0]
    assert len(fillers) == 3 and all(len(batch["inputs"]) == 1 for batch in fillers)


def test_loader_processes_change_no_bit(data):
    assert same(slots_of(build(data, num_workers=1)), slots_of(build(data)))


def test_balanced_and_bucketed_orders_are_used(data):
    labels = torch.cat([batch["labels"][:count] for _, _, count, batch in slots_of(build(data, balanced=True))])
    counts = torch.bincount(labels)
    assert counts.max() - counts.min() <= 1 and len(labels) == SIZE

    class Lengths(Arrays):
        @property
        def lengths(self):
            return self.tensors["lengths"]

    lengths = torch.randint(1, 200, (SIZE,), generator=torch.Generator().manual_seed(2))
    tokens = torch.ones(SIZE, 1, dtype=torch.int64)
    split = Split(Lengths({"tokens": tokens, "lengths": lengths}), torch.zeros(SIZE, dtype=torch.int64))
    text = DataModule("x", "", InputSpec("text", vocabulary_size=9), split, split, None, ["a"])
    batches = [batch["lengths"] for _, _, _, batch in slots_of(build(text, slots=1, augmentation=Augmentation()))]
    assert sum(map(len, batches)) == SIZE
    spread = sum(int(batch.max() - batch.min()) for batch in batches[:-1]) / len(batches[:-1])
    assert spread < 40  # of 200; in plain order about 150


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_that_are_copied_ahead_are_the_same(data):
    """Whole-pixel changes are the same on every device; the computation must not overtake the copy."""
    changes = Augmentation(crop=2, flip=True, cutout=3)
    expected = slots_of(build(data, augmentation=changes))
    for (_, _, _, there), (_, _, _, here) in zip(slots_of(build(data, augmentation=changes, device="cuda")), expected):
        for name, tensor in there.items():
            assert tensor.device.type == "cuda"
            assert torch.allclose(tensor.cpu(), here[name], atol=1e-6)
