"""Learning rates equal those of torch's own schedulers; plateau and early stopping count as they say."""

import math
import random

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from train.engine.schedule import EarlyStopping, Plateau, build_schedule
from train.engine.settings import TrainSettings

TOTAL = 100


class RateOnly(torch.optim.Optimizer):
    """Holds a rate; a real optimizer imports torch._dynamo, which takes longer than all of these tests."""

    def __init__(self):
        self.param_groups = [{"lr": 1.0, "params": []}]
        self.defaults, self.state = {}, {}

    def step(self):
        """Change nothing."""


def ours(kind, total=TOTAL, steps=TOTAL, **settings):
    schedule = build_schedule(TrainSettings(lr_scheduler=kind, **settings), total)
    return [schedule(step) for step in range(steps)]


def rates_of(build, steps=TOTAL):
    """Return the rates of one of torch's schedulers, for a peak of 1."""
    optimizer = RateOnly()
    scheduler = build(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def near(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_constant():
    assert ours("constant") == [1.0] * TOTAL


@pytest.mark.parametrize(("size", "gamma"), [(1, 0.9), (30, 0.5), (200, 0.1)])
def test_step_equals_torch(size, gamma):
    expected = rates_of(lambda optimizer: theirs.StepLR(optimizer, size, gamma))
    assert ours("step", lr_step_size=size, lr_gamma=gamma) == near(expected)


def test_linear_equals_torch_and_the_formula():
    expected = rates_of(lambda optimizer: theirs.LinearLR(optimizer, 1.0, 0.0, TOTAL))
    assert ours("linear") == near(expected)
    assert ours("linear") == near([1 - step / TOTAL for step in range(TOTAL)])


def test_cosine_equals_torch():
    assert ours("cosine") == near(rates_of(lambda optimizer: theirs.CosineAnnealingLR(optimizer, TOTAL)))


@pytest.mark.parametrize("total", [10, 100, 1001])
@pytest.mark.parametrize("warmup", [0, 3, 9])
def test_one_cycle_equals_torch(total, warmup):
    share = {"pct_start": warmup / total} if warmup else {}
    expected = rates_of(lambda o: theirs.OneCycleLR(o, 1.0, total, cycle_momentum=False, **share), total)
    assert ours("one_cycle", total, total, warmup_steps=warmup) == near(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_rate_stays_at_zero_past_the_end(kind):
    assert ours(kind, steps=3 * TOTAL)[TOTAL:] == [0.0] * 2 * TOTAL


def test_one_cycle_stays_at_its_lowest_past_the_end():
    assert ours("one_cycle", steps=3 * TOTAL)[TOTAL - 1 :] == near([1 / 250_000] * (2 * TOTAL + 1))


@pytest.mark.parametrize("kind", ["constant", "step", "linear", "cosine", "plateau"])
def test_warmup_rises_to_the_peak_then_the_shape_begins(kind):
    warmup = 20
    rates = ours(kind, warmup_steps=warmup, lr_step_size=30)
    assert rates[:warmup] == near([(step + 1) / warmup for step in range(warmup)])
    assert rates[warmup:] == near(ours(kind, TOTAL - warmup, TOTAL - warmup, lr_step_size=30))


@pytest.mark.parametrize("kind", ["constant", "step", "linear", "cosine", "one_cycle", "plateau"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("total", [1, 2, 5])
def test_rates_of_tiny_runs_are_between_zero_and_the_peak(kind, warmup, total):
    assert all(0.0 <= rate <= 1.0 for rate in ours(kind, total, total + 3, warmup_steps=warmup))


@pytest.mark.parametrize("factor", [0.5, 0.1])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_equals_torch(factor, patience):
    optimizer = RateOnly()
    reference = theirs.ReduceLROnPlateau(optimizer, factor=factor, patience=patience, eps=0.0)
    plateau = Plateau()
    generator = random.Random(0)
    value = 10.0
    for _ in range(300):
        # Changes around the threshold of 1e-4, exact repeats, falls and jumps.
        value *= generator.choice([1.0, 1 - 0.9e-4, 1 - 1.1e-4, 0.9, 1.05])
        seen = generator.choice([value, value, value, math.nan, math.inf]) if plateau.best else value
        reference.step(seen)
        plateau.update(seen, factor, patience)
        assert plateau.scale == near(optimizer.param_groups[0]["lr"])
        assert (plateau.best, plateau.bad_evaluations) == (reference.best, reference.num_bad_epochs)
    assert 0 < plateau.scale < 1e-3  # reduced many times, else nothing was compared


def stopped_at(values, patience, min_delta=0.0):
    stopping = EarlyStopping()
    for number, value in enumerate(values, start=1):
        stopping.update(value, min_delta)
        if stopping.exhausted(patience):
            return number
    return None


def test_early_stopping_counts_evaluations_without_improvement():
    assert stopped_at([5, 4, 4, 4, 4], patience=3) == 5
    assert stopped_at([5, 4, 4, 4, 3, 3, 3], patience=3) is None  # an improvement starts the count again
    assert stopped_at([5, 6, 4.5, 6], patience=1) == 2


def test_improvement_must_exceed_min_delta():
    assert stopped_at([5.0, 4.5, 4.0], patience=2, min_delta=0.5) is None  # 4.0 is 1.0 below the best, 5.0
    assert stopped_at([5.0, 4.5, 4.5], patience=2, min_delta=0.5) == 3
    assert stopped_at([5.0, 4.25, 3.5], patience=1, min_delta=0.5) is None


def test_nan_is_no_improvement_and_never_the_best():
    assert stopped_at([math.nan, math.nan], patience=2) == 2
    assert stopped_at([math.nan, 5, math.nan, 4, math.nan, 3], patience=2) is None
    stopping = EarlyStopping()
    stopping.update(math.nan, 0.0)
    assert stopping.best is None


def test_patience_zero_never_ends_training():
    assert stopped_at([1.0] * 1000, patience=0) is None
