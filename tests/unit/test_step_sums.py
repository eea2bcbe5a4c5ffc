"""What is logged of the steps since the last line: the same bits whenever the sums are made."""

import math

import pytest
import torch

from train.engine.step_sums import MOST_STEPS, StepSums


def numbers(steps, slots=2):
    """Return, for each step, two metrics of each slot, the samples and the norm."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand((), generator=generator)  # noqa: E731
    return [([[draw(), draw()] for _ in range(slots)], 5 + step, 2 * draw()) for step in range(steps)]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_sums_are_those_of_float64_in_the_order_of_the_steps(on_cpu):
    sums, kept = StepSums(max_grad_norm=1.0, on_cpu=on_cpu), numbers(7)
    for step in kept:
        sums.keep(*step)
    wanted = [0.0] * 6
    for slots, count, norm in kept:
        row = [slots[0][0].item() + slots[1][0].item(), slots[0][1].item() + slots[1][1].item()]
        row += [count, norm.item(), norm.item() > 1, 1]
        wanted = [one + other for one, other in zip(wanted, row)]
    found = sums.add_to(None)
    assert found.dtype == torch.float64 and found.tolist() == wanted
    assert 0 < wanted[4] < 7
    assert sums.add_to(found) is found and sums.add_to(None) is None


@pytest.mark.parametrize("looks", [(1, 2, 3), (4,), (0, 6)])
def test_neither_the_moment_nor_the_place_of_adding_up_changes_a_bit(looks):
    whole, parts, window = StepSums(0.0, on_cpu=True), StepSums(0.0, on_cpu=False), None
    for number, step in enumerate(numbers(7)):
        whole.keep(*step)
        parts.keep(*step)
        if number in looks:
            window = parts.add_to(window)
    assert whole.add_to(None).equal(parts.add_to(window))


def test_steps_that_were_not_applied_do_not_count():
    sums = StepSums(1.0, on_cpu=True)
    for norm in (0.5, math.nan, math.inf, 2.0):
        sums.keep([[torch.tensor(1.0 if math.isfinite(norm) else math.nan)]], 4, torch.tensor(norm))
    assert sums.add_to(None).tolist() == [2.0, 8.0, 2.5, 1.0, 2.0]


def test_it_says_when_it_has_kept_enough():
    sums, step = StepSums(1.0, on_cpu=True), numbers(1)[0]
    for number in range(MOST_STEPS):
        assert not sums.full, number
        sums.keep(*step)
    assert sums.full
    sums.add_to(None)
    assert not sums.full
