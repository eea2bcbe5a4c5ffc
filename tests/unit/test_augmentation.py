"""Augmentation: each sample's result is a pure function of its pixels and (seed, epoch, index)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn.functional import pad

from data_modules.augmentation import (
    Augmentation,
    mix,
    parse_augmentation,
    random_bits,
    uniform,
    whole_numbers,
)

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**63 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
MASK = 2**64 - 1


def splitmix(state):
    """Yield the outputs of SplitMix64 from a start state, in Python's unbounded integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def expected_bits(seed, epoch, index, purpose):
    """Return what `random_bits` is specified to return, as an unsigned integer."""
    key = 0
    for number in (seed, epoch, purpose):
        key = next(splitmix(key + number * 0x9E3779B97F4A7C15))
    return next(splitmix(key + index * 0x9E3779B97F4A7C15))


def images(*shape, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, shape, generator=generator).to(dtype)


# --- random numbers


def test_the_reference_is_splitmix64():
    # The first outputs of Vigna's splitmix64.c from state 1234567, as they are quoted in many places.
    outputs = splitmix(1234567)
    assert [next(outputs) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@quick
@given(seeds, st.integers(0, 2**40), st.lists(int64, min_size=1, max_size=40), st.integers(0, 200))
def test_bits_are_those_of_the_reference(seed, epoch, indices, purpose):
    expected = [expected_bits(seed, epoch, index, purpose) for index in indices]
    tensor = torch.tensor(indices)
    assert [bits % 2**64 for bits in random_bits(seed, epoch, tensor, purpose).tolist()] == expected
    numbers = uniform(seed, epoch, tensor, purpose)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [(bits >> 40) / 2**24 for bits in expected]
    for count in (1, 2, 9, 60_000, 2**31):
        assert whole_numbers(seed, epoch, tensor, purpose, count).tolist() == [
            (bits >> 32) * count >> 32 for bits in expected
        ]


def test_what_is_done_to_a_sample_is_pinned():
    # Another value here changes every run that goes on from an older checkpoint.
    everything = Augmentation(crop=1, flip=True, cutout=1, mixup=0.2)
    data, indices = torch.arange(1, 13).view(1, 1, 3, 4).expand(2, -1, -1, -1), torch.tensor([3, 41])
    assert everything.pixels(data, indices, 9, 7)[:, 0].tolist() == [
        [[6, 7, 8, 0], [10, 11, 12, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [2, 3, 4, 0], [6, 7, 8, 0]],
    ]
    assert everything.cut(data, indices, 9, 7)[:, 0].tolist() == [
        [[1, 2, 3, 4], [5, 6, 7, 0], [9, 10, 11, 12]],
        [[1, 0, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]],
    ]
    assert everything.partners(indices, 9, 7, 1000).tolist() == [887, 99]
    assert everything.mix_weights(indices, 9, 7).tolist() == pytest.approx([0.98676044, 0.97722554], rel=1e-6)
    turned = Augmentation(rotate=20, scale=0.5).pixels(data, indices, 9, 7)
    assert turned[:, 0, 0, 0].tolist() == pytest.approx([1.2053, 2.8531], abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bits_are_the_same_on_a_gpu():
    indices = torch.arange(-5_000, 5_000) * 0x123456789ABC
    assert torch.equal(random_bits(5, 6, indices.cuda(), 7).cpu(), random_bits(5, 6, indices, 7))
    assert torch.equal(uniform(5, 6, indices.cuda(), 7).cpu(), uniform(5, 6, indices, 7))


STREAMS = [(seed, epoch, purpose) for seed in (0, 1, 2**62) for epoch in (0, 1, 2, 90) for purpose in (0, 1, 8)]


@pytest.mark.parametrize("stream", STREAMS)
def test_numbers_are_uniform(stream):
    seed, epoch, purpose = stream
    numbers = uniform(seed, epoch, torch.arange(50_000), purpose)
    assert numbers.min() >= 0 and numbers.max() < 1
    # Fixed numbers: with 36 streams and two tests, a fair generator falls below 1e-4 once in 140 choices of STREAMS.
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-4
    counts = whole_numbers(seed, epoch, torch.arange(50_000), purpose, 9).bincount(minlength=9)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_streams_and_neighbours_are_not_correlated():
    count = 50_000
    numbers = torch.stack([uniform(seed, epoch, torch.arange(count), purpose) for seed, epoch, purpose in STREAMS])
    # Below 5 standard deviations of the correlation of independent numbers, 1 / sqrt(count).
    limit = 5 / count**0.5
    between = torch.corrcoef(numbers) - torch.eye(len(STREAMS))
    assert between.abs().max() < limit
    for distance in (1, 2, 3, 64, 128):
        for row in numbers:
            assert torch.corrcoef(torch.stack((row[:-distance], row[distance:])))[0, 1].abs() < limit
    # Pairs fill the square evenly, which no correlation shows.
    for other in range(1, len(STREAMS)):
        cells = (numbers[0] * 16).long() * 16 + (numbers[other] * 16).long()
        assert stats.chisquare(cells.bincount(minlength=256).numpy()).pvalue > 1e-5


# --- independence of the batch

WORDS = [
    ["crop:3"],
    ["flip"],
    ["crop:2", "flip"],
    ["rotate:15"],
    ["scale:0.2"],
    ["crop:2", "flip", "rotate:180", "scale:0.3", "cutout:4", "mixup:0.4"],
]


def augment(augmentation, data, indices, epoch=2, seed=5):
    """Do all that a training step does to the samples at `indices`; `data` are all samples of the split."""

    def single(chosen):
        changed = augmentation.pixels(data[chosen], chosen, epoch, seed)
        return augmentation.cut(changed.float() / 100 - 1, chosen, epoch, seed)

    if not augmentation.mixup:
        return single(indices)
    partners = augmentation.partners(indices, epoch, seed, len(data))
    return mix(single(indices), single(partners), augmentation.mix_weights(indices, epoch, seed))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 11), (2, 16, 9)], ids=str)
@pytest.mark.parametrize("words", WORDS, ids="+".join)
def test_a_batch_equals_its_samples_one_by_one(words, shape):
    augmentation = parse_augmentation(words)
    data = images(64, *shape)
    together = augment(augmentation, data, torch.arange(64))
    for index in range(64):
        assert torch.equal(augment(augmentation, data, torch.tensor([index])), together[index : index + 1])


@quick
@given(
    st.data(),
    st.sampled_from(WORDS),
    st.tuples(st.integers(1, 4), st.integers(5, 20), st.integers(5, 20)),
    seeds,
    st.integers(0, 10**6),
)
def test_neither_order_nor_company_changes_a_sample(data, words, shape, seed, epoch):
    augmentation = parse_augmentation(words)
    split = images(20, *shape)
    whole = augment(augmentation, split, torch.arange(20), epoch, seed)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=33)))
    assert torch.equal(augment(augmentation, split, chosen, epoch, seed), whole[chosen])


def test_another_epoch_seed_or_index_changes_the_result():
    augmentation = parse_augmentation(["crop:4", "flip", "rotate:10", "cutout:5"])
    one = images(1, 1, 28, 28).expand(50, -1, -1, -1)
    indices = torch.arange(50)
    base = augment(augmentation, one, indices, 0, 0)
    assert len({tuple(image.flatten().tolist()) for image in base}) == 50
    for epoch, seed in ((1, 0), (0, 1)):
        other = augment(augmentation, one, indices, epoch, seed)
        assert (other != base).flatten(1).any(1).all()


def test_one_augmentation_does_not_change_the_draws_of_another():
    data, indices = images(30, 1, 12, 12), torch.arange(30)
    crop = parse_augmentation(["crop:3"]).pixels(data, indices, 1, 1)
    both = parse_augmentation(["flip", "crop:3", "mixup:1"]).pixels(data, indices, 1, 1)
    mirrored = (both == crop.flip(-1)).flatten(1).all(1)
    same = (both == crop).flatten(1).all(1)
    assert (mirrored ^ same).all() and 5 < mirrored.sum() < 25


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    augment(parse_augmentation(WORDS[-1]), images(8, 1, 9, 9), torch.arange(8))
    assert torch.equal(torch.get_rng_state(), before)


# --- crop and flip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int16])
def test_crop_and_flip_are_exact_copies(dtype):
    crop, height, width = 3, 6, 9
    data = images(400, 2, height, width, dtype=dtype)
    changed = Augmentation(crop=crop, flip=True).pixels(data, torch.arange(400), 0, 0)
    assert changed.dtype == dtype and changed.shape == data.shape
    found = []
    for image, result in zip(pad(data, (crop,) * 4), changed):
        matches = [
            (y, x, mirrored)
            for y in range(2 * crop + 1)
            for x in range(2 * crop + 1)
            for mirrored in (False, True)
            if torch.equal(image[:, y : y + height, x : x + width], result.flip(-1) if mirrored else result)
        ]
        assert len(matches) == 1
        found += matches
    rows, columns, mirrored = (torch.tensor(values) for values in zip(*found))
    assert 160 < mirrored.sum() < 240
    for shifts in (rows, columns):
        assert stats.chisquare(shifts.bincount(minlength=2 * crop + 1).numpy()).pvalue > 1e-3
    table = torch.zeros(7, 7)
    table.index_put_((rows, columns), torch.ones(400), accumulate=True)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_flip_alone_swaps_left_and_right_only():
    data = images(100, 3, 5, 8)
    changed = Augmentation(flip=True).pixels(data, torch.arange(100), 0, 0)
    same = (changed == data).flatten(1).all(1)
    mirrored = (changed == data.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 30 < same.sum() < 70


def test_what_comes_in_from_outside_is_black():
    white = torch.full((200, 1, 10, 10), 255, dtype=torch.uint8)
    changed = Augmentation(crop=4).pixels(white, torch.arange(200), 0, 0)
    assert set(changed.unique().tolist()) == {0, 255}
    # The picture stays one rectangle, cut by whole rows and columns at the border.
    rows, columns = changed[:, 0].amax(2) > 0, changed[:, 0].amax(1) > 0
    assert torch.equal(changed[:, 0] > 0, rows[:, :, None] & columns[:, None, :])
    assert set(rows.sum(1).tolist()) == set(range(6, 11))


def test_inputs_are_not_changed():
    data = images(20, 1, 12, 12, dtype=torch.float32)
    kept = data.clone()
    augmentation = parse_augmentation(WORDS[-1])
    augmentation.pixels(data, torch.arange(20), 0, 0)
    augmentation.cut(data, torch.arange(20), 0, 0)
    assert torch.equal(data, kept)


# --- rotation and scale


def moments(images_BCHW):
    """Return, for each image, its centre of mass (x, y) from the middle, and its spread and tilt, float64 [B]."""
    weights = images_BCHW[:, 0].double()
    height, width = weights.shape[1:]
    total = weights.sum((1, 2))
    across = torch.arange(width) - (width - 1) / 2
    down = (torch.arange(height) - (height - 1) / 2)[:, None]
    x, y = (weights * across).sum((1, 2)) / total, (weights * down).sum((1, 2)) / total
    xx, yy, xy = ((weights * term).sum((1, 2)) / total for term in (across**2, down**2, across * down))
    return x, y, xx + yy, 0.5 * torch.atan2(2 * xy, xx - yy)


def bar(height, width):
    """Return a long level bar in the middle, [1, 1, H, W]."""
    image = torch.zeros(1, 1, height, width, dtype=torch.uint8)
    image[..., height // 2 - 2 : height // 2 + 2, width // 2 - 12 : width // 2 + 12] = 200
    return image


@pytest.mark.parametrize("size", [(40, 40), (40, 60), (60, 41), (41, 60)], ids=str)
def test_rotation_keeps_shape_and_centre_and_turns_by_uniform_angles(size):
    count, degrees = 1000, 25
    one = bar(*size)
    turned = Augmentation(rotate=degrees).pixels(one.expand(count, -1, -1, -1), torch.arange(count), 0, 0)
    assert turned.dtype == torch.float32 and turned.shape == (count, 1, *size)
    x, y, spread, tilt = moments(turned)
    x_before, y_before, spread_before, _ = moments(one)
    # A length stays a length: images that are not square are not sheared.
    assert torch.allclose(spread, spread_before.expand(count), rtol=0.03)
    angles = tilt.rad2deg()
    # The middle of the image is the pivot; a bar that is off by half a pixel turns round it.
    assert ((x - x_before) ** 2 + (y - y_before) ** 2).max() < 0.3**2
    assert stats.kstest((angles / (2 * degrees) + 0.5).numpy(), "uniform").pvalue > 1e-3
    assert -degrees - 0.5 < angles.min() < -degrees + 1 and degrees - 1 < angles.max() < degrees + 0.5


def test_scale_is_uniform_and_the_same_along_both_axes():
    one = bar(44, 60)
    scaled = Augmentation(scale=0.2).pixels(one.expand(1000, -1, -1, -1), torch.arange(1000), 0, 0)
    _, _, spread, tilt = moments(scaled)
    factors = (spread / moments(one)[2]).sqrt()
    assert tilt.abs().max() < 1e-3
    assert stats.kstest(((factors - 0.8) / 0.4).numpy(), "uniform").pvalue > 1e-3
    assert 0.79 < factors.min() < 0.81 and 1.19 < factors.max() < 1.21
    areas = scaled.double().sum((1, 2, 3)) / one.sum()
    assert torch.allclose(areas, factors**2, rtol=0.05)


def test_rotation_and_scale_are_drawn_independently():
    one = bar(44, 60)
    both = Augmentation(rotate=20, scale=0.2).pixels(one.expand(1000, -1, -1, -1), torch.arange(1000), 0, 0)
    _, _, spread, tilt = moments(both)
    assert torch.corrcoef(torch.stack((spread, tilt)))[0, 1].abs() < 0.12


def test_rotation_stays_in_the_range_and_fills_with_black():
    white = torch.full((64, 3, 17, 23), 255, dtype=torch.uint8)
    turned = Augmentation(rotate=45, scale=0.3).pixels(white, torch.arange(64), 0, 0)
    assert turned.min() == 0 and 254.9 < turned.max() <= 255.01
    assert (turned[:, :, 8, 11] > 254.9).all()
    assert (turned[:, :, 0, 0] == 0).any()


def test_no_angle_and_no_zoom_is_the_image():
    data = images(10, 2, 13, 8)
    nearly = Augmentation(rotate=1e-9).pixels(data, torch.arange(10), 0, 0)
    assert torch.allclose(nearly, data.float(), atol=1e-2)


# --- cutout


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_sets_one_square_to_the_mean(side):
    height, width, count = 9, 14, 3000
    data = images(count, 2, height, width, dtype=torch.float32)
    result = Augmentation(cutout=side).cut(data, torch.arange(count), 0, 0)
    holes = (result == 0).all(1)
    assert torch.equal(result, data.masked_fill(holes[:, None], 0))
    rows, columns = holes.any(2), holes.any(1)
    assert torch.equal(holes, rows[:, :, None] & columns[:, None, :])
    for covered, length in ((rows, height), (columns, width)):
        # Every centre gives another run of covered places, all equally often.
        runs = {tuple(r for r in range(c - side // 2, c - side // 2 + side) if 0 <= r < length) for c in range(length)}
        seen = [tuple(place.nonzero()[:, 0].tolist()) for place in covered]
        assert set(seen) == runs and len(runs) == length
        assert stats.chisquare([seen.count(run) for run in runs]).pvalue > 1e-3


def test_cutout_is_as_large_as_asked_for():
    result = Augmentation(cutout=8).cut(torch.ones(500, 1, 28, 28), torch.arange(500), 0, 0)
    assert (result == 0).sum((1, 2, 3)).max() == 64


# --- mixup


def test_partners_are_drawn_from_the_whole_split():
    partners = Augmentation(mixup=1.0).partners(torch.arange(40_000), 3, 1, 100)
    assert partners.dtype == torch.int64
    assert stats.chisquare(partners.bincount(minlength=100).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0])
def test_weights_follow_the_beta_distribution(alpha):
    weights = Augmentation(mixup=alpha).mix_weights(torch.arange(50_000), 0, 0)
    assert weights.dtype == torch.float32
    assert weights.min() >= 0.5 and weights.max() <= 1

    def distribution(value):  # of max(w, 1 - w)
        return 2 * stats.beta(alpha, alpha).cdf(value) - 1

    # 4,096 values: the steps are at most 1 / 4,096 high, to which the noise of 50,000 draws is added.
    below = weights[weights < 0.999].double()
    found = torch.stack([(weights <= value).double().mean() for value in below[:500]])
    assert (found - torch.tensor(distribution(below[:500].numpy()))).abs().max() < 1 / 4096 + 2 / 50_000**0.5


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 100.0])
def test_extreme_mixing_stays_finite(alpha):
    weights = Augmentation(mixup=alpha).mix_weights(torch.arange(5000), 0, 0)
    assert weights.isfinite().all() and weights.min() >= 0.5 and weights.max() <= 1


def test_mix_is_the_weighted_mean():
    one, other = torch.full((3, 1, 2, 2), 8.0), torch.full((3, 1, 2, 2), -4.0)
    assert mix(one, other, torch.tensor([1.0, 0.5, 0.75]))[:, 0, 0, 0].tolist() == [8.0, 2.0, 5.0]
    data = images(3, 1, 4, 4, dtype=torch.float32)
    assert torch.equal(mix(data, -data.flip(0), torch.ones(3)), data)


# --- words


def test_words_become_an_augmentation():
    words = ["crop:4", "flip", "rotate:10", "scale:0.1", "cutout:8", "mixup:0.2"]
    assert parse_augmentation(words) == Augmentation(4, True, 10.0, 0.1, 8, 0.2)
    assert parse_augmentation(words[::-1]) == parse_augmentation(words)


def test_no_words_do_nothing():
    nothing = parse_augmentation([])
    assert not nothing
    data, indices = images(4, 1, 5, 5), torch.arange(4)
    assert nothing.pixels(data, indices, 0, 0) is data
    assert nothing.cut(data.float(), indices, 0, 0).tolist() == data.float().tolist()


@pytest.mark.parametrize("word", ["crop:1", "flip", "rotate:180", "scale:0.99", "cutout:1", "mixup:100"])
def test_each_word_counts(word):
    assert parse_augmentation([word])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["blur:2"], "'blur:2': unknown"),
        ([""], "'': unknown"),
        (["Flip"], "'Flip': unknown"),
        (["flip", "crop:2", "flip"], "'flip': flip is given twice"),
        (["crop:2", "crop:3"], "'crop:3': crop is given twice"),
        (["flip:1"], "'flip:1': flip takes no number"),
        (["flip:"], "'flip:': flip takes no number"),
        (["crop"], "'crop': crop takes a whole number of pixels, 1 or more"),
        (["crop:"], "'crop:': crop takes a whole number of pixels, 1 or more"),
        (["crop:0"], "'crop:0': crop takes"),
        (["crop:-3"], "'crop:-3': crop takes"),
        (["crop:1.5"], "'crop:1.5': crop takes"),
        (["crop:2:3"], "'crop:2:3': crop takes"),
        (["rotate:0"], "'rotate:0': rotate takes degrees, above 0, at most 180"),
        (["rotate:181"], "'rotate:181': rotate takes"),
        (["rotate:nan"], "'rotate:nan': rotate takes"),
        (["rotate:ten"], "'rotate:ten': rotate takes"),
        (["scale:1"], "'scale:1': scale takes a share, above 0 and below 1"),
        (["scale:-0.1"], "'scale:-0.1': scale takes"),
        (["cutout:0"], "'cutout:0': cutout takes a whole number of pixels, 1 or more"),
        (["mixup:0"], "'mixup:0': mixup takes a number, above 0, at most 100"),
        (["mixup:inf"], "'mixup:inf': mixup takes"),
    ],
)
def test_refused_words(words, problem):
    with pytest.raises(ValueError, match="augmentation") as caught:
        parse_augmentation(words)
    message = str(caught.value)
    assert message.startswith(f"augmentation {problem}") and "\n" not in message
    assert "Accepted: crop:4, flip, rotate:10, scale:0.1, cutout:8 and mixup:0.2" in message


def test_sizes_that_leave_nothing_are_refused():
    Augmentation(crop=7, cutout=7, rotate=90).check_size(8, 10)
    for augmentation, word in ((Augmentation(crop=8), "crop:8"), (Augmentation(cutout=9), "cutout:9")):
        for size in ((8, 10), (10, 8)):
            with pytest.raises(ValueError, match=f"'{word}': must be below the shorter side .* {size[0]} x {size[1]} "):
                augmentation.check_size(*size)
