"""The norm of the gradients and its limit, as torch.nn.utils has them."""

import copy

import pytest
import torch
from torch import nn

from train.engine.clipping import clip_gradients


def parameters(scale, dtypes=(torch.float32,)):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(6):
        parameter = nn.Parameter(torch.zeros(7, number + 1, dtype=dtypes[number % len(dtypes)]))
        parameter.grad = (scale * torch.randn(7, number + 1, generator=generator)).to(parameter.dtype)
        found.append(parameter)
    return [*found, nn.Parameter(torch.zeros(3))]  # one without a gradient


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32)], ids=["fp32", "mixed"])
@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1 / 12, 5.0, float("inf"), float("nan")])
def test_the_numbers_of_torch(scale, limit, dtypes):
    """A scale of 1/12 gives a norm close to 1."""
    mine, theirs = parameters(scale, dtypes), parameters(scale, dtypes)
    norm = clip_gradients(mine, limit)
    same = nn.utils.get_total_norm([parameter.grad for parameter in theirs[:-1]])
    if limit:
        nn.utils.clip_grads_with_norm_(theirs, limit, same)
    assert norm.dtype == torch.float32 and norm.isfinite() == same.isfinite()
    if norm.isfinite():  # else the gradients are not used
        torch.testing.assert_close(norm, same.float())
        for one, other in zip(mine[:-1], theirs[:-1]):
            torch.testing.assert_close(one.grad, other.grad)
    assert mine[-1].grad is None


def test_small_gradients_are_left_and_large_ones_limited():
    small, large = parameters(1e-3), parameters(5.0)
    before = copy.deepcopy([parameter.grad for parameter in small[:-1]])
    assert clip_gradients(small, 1.0) < 0.1 and clip_gradients(large, 1.0) > 40
    assert all(parameter.grad.equal(grad) for parameter, grad in zip(small, before))
    assert clip_gradients(large, 0.0).item() == pytest.approx(1.0, abs=1e-5)


def test_no_gradient_at_all():
    assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0) == 0
