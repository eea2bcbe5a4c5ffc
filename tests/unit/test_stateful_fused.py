"""The fused engine does what the reference does, however a stretch is cut, and leaves what the reference leaves.

A distance is relative: the largest difference of two tensors over the largest value of the second.
"""

import copy
import math

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from data_modules.frequency import make_sinusoids
from models.frequency_lstm import FrequencyLSTM
from train.stateful import kernel
from train.stateful.contract import SUMS, Course, DivergedError
from train.stateful.eager import EagerEngine
from train.stateful.fused import FusedEngine

NEAR = {torch.float32: 1e-5, torch.float64: 1e-10}
ENGINES = [EagerEngine, FusedEngine]


class Run:
    """A course with an engine, its state and its sums."""

    def __init__(self, engine, samples, window=1, size=16, columns=5, max_grad_norm=1.0, dtype=torch.float32):
        torch.manual_seed(0)
        model = FrequencyLSTM(columns, size).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
        inputs = torch.randn(samples, columns, dtype=dtype)
        targets = inputs[:, :1].cumsum(0).sin() + torch.randn(samples, 1, dtype=dtype) / 10
        self.course = Course(model, optimizer, inputs, targets, window, max_grad_norm)
        self.sums = torch.zeros(SUMS, dtype=torch.float64)
        self.state = None
        self.updates = 0
        self.use(engine)

    def use(self, engine):
        self.engine = engine(self.course)

    def advance(self, start=0, stop=None):
        stop = len(self.course.inputs) if stop is None else stop
        count = math.ceil((stop - start) / self.course.window)
        rates = [3e-4 * (1 + math.sin(update) / 2) for update in range(self.updates, self.updates + count)]
        self.updates += count
        self.state = self.engine.advance(start, stop, self.state, rates, self.sums)
        return self

    def tensors(self):
        optimizer = self.course.optimizer
        named = {"sums": self.sums, "rate": torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)}
        if self.state is not None:
            named |= {"hidden": self.state[0], "cell": self.state[1]}
        for name, parameter in self.course.model.named_parameters():
            named[name] = parameter.detach()
            named |= {f"{kind} of {name}": moment for kind, moment in optimizer.state[parameter].items()}
        return {name: tensor.clone() for name, tensor in named.items()}


def assert_near(run, reference, tolerance):
    ours, theirs = run.tensors(), reference.tensors()
    assert ours.keys() == theirs.keys()
    distances = {name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours}
    assert max(distances.values()) <= tolerance, {name: far for name, far in distances.items() if not far <= tolerance}


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize(("samples", "window", "max_grad_norm"), [(500, 1, 1.0), (3494, 7, 0.6)])
def test_a_thousand_updates_are_those_of_the_reference(dtype, samples, window, max_grad_norm):
    runs = []
    for engine in ENGINES:
        run = Run(engine, samples, window, max_grad_norm=max_grad_norm, dtype=dtype)
        runs.append(run.advance().advance())  # two epochs: the second starts from zeros
    assert_near(runs[1], runs[0], NEAR[dtype])
    clipped, updates = runs[1].sums[3:].tolist()
    assert updates == 1000 and 100 < clipped < 900


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize(("size", "columns", "max_grad_norm"), [(64, 5, 0.0), (7, 1, 1e-3), (1, 2, 0.0), (33, 6, 0.2)])
def test_other_sizes_are_those_of_the_reference(dtype, size, columns, max_grad_norm, window):
    runs = [Run(engine, 100, window, size, columns, max_grad_norm, dtype).advance() for engine in ENGINES]
    assert_near(runs[1], runs[0], NEAR[dtype])


def test_on_the_sinusoids_it_is_as_near_to_exact_arithmetic_as_the_reference_is():
    """There a difference in the last bit grows a thousandfold in as many updates, whatever computes them."""
    data = make_sinusoids("train")
    torch.manual_seed(0)
    start = FrequencyLSTM()
    weights = []
    for engine, dtype in [(EagerEngine, torch.float64), (EagerEngine, torch.float32), (FusedEngine, torch.float32)]:
        model = copy.deepcopy(start).to(dtype)
        optimizer = torch.optim.Adam(model.parameters())
        course = Course(model, optimizer, data.inputs.to(dtype), data.targets.to(dtype), 1, 1.0)
        engine(course).advance(0, 1000, None, [1e-3] * 1000, torch.zeros(SUMS, dtype=torch.float64))
        weights.append(torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()]))
    exact, reference, fused = weights
    assert (fused - exact).abs().max() < 2 * (reference - exact).abs().max() < 1e-3


@pytest.mark.parametrize("window", [1, 7, 100])
def test_the_bits_do_not_depend_on_how_a_stretch_is_cut(window):
    whole, cut = (Run(FusedEngine, 1005, window, size=17) for _ in range(2))
    whole.advance().advance(0, 700)
    for start, stop in (
        [(0, 100), (100, 200), (200, 900), (900, 1005), (0, 700)]
        if window == 100
        else [(0, window), (window, 77), (77, 84), (84, 1001), (1001, 1005), (0, 700)]
    ):
        cut.advance(start, stop)
    assert_same(cut.tensors(), whole.tensors())


@pytest.mark.parametrize("order", [ENGINES, ENGINES[::-1]])
@pytest.mark.parametrize("window", [1, 7])
def test_either_engine_goes_on_from_the_other(window, order):
    reference = Run(EagerEngine, 140, window).advance().advance(0, 70)
    run = Run(order[0], 140, window).advance(0, 70)
    run.use(order[1])
    assert_near(run.advance(70).advance(0, 70), reference, NEAR[torch.float32])


def test_it_goes_on_from_a_loaded_checkpoint_to_the_same_bits():
    whole, first, second = (Run(FusedEngine, 60) for _ in range(3))
    whole.advance()
    first.advance(0, 30)
    second.course.model.load_state_dict(first.course.model.state_dict())
    second.course.optimizer.load_state_dict(first.course.optimizer.state_dict())
    second.state, second.updates, second.sums = first.state, first.updates, first.sums
    assert_same(second.advance(30).tensors(), whole.tensors())


# Of 1e30 the square is not finite, of 1.5e19 only the norm.
@pytest.mark.parametrize(("window", "value"), [(1, math.nan), (1, 1e30), (1, 1.5e19), (7, math.inf), (7, 1e30)])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_that_is_not_finite_leaves_all_as_the_last_good_one_did(engine, window, value):
    good, bad = (Run(engine, 140, window) for _ in range(2))
    good.advance(0, 70)
    bad.course.targets[72] = value
    with pytest.raises(DivergedError) as error:
        bad.advance()
    assert error.value.updates == good.updates + (72 - 70) // window
    if window == 1:
        good.advance(70, 72)
    good.state = None
    assert_same(bad.tensors(), good.tensors())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_number_in_the_inputs_ends_it_at_the_first_update(engine):
    run = Run(engine, 10)
    run.course.inputs[0] = math.nan
    before = [parameter.detach().clone() for parameter in run.course.model.parameters()]
    with pytest.raises(DivergedError) as error:
        run.advance()
    assert error.value.updates == 0 and run.sums.tolist() == [0] * SUMS
    assert run.course.optimizer.param_groups[0]["lr"] == 0.5
    assert all(torch.equal(one, other) for one, other in zip(before, run.course.model.parameters()))


def test_the_optimizer_has_what_torch_would_save():
    saved = [Run(engine, 20).advance().course.optimizer.state_dict() for engine in ENGINES]
    layouts = [
        {
            number: {kind: (value.dtype, value.shape, value.stride()) for kind, value in moments.items()}
            for number, moments in state["state"].items()
        }
        for state in saved
    ]
    assert layouts[1] == layouts[0]
    assert saved[1]["param_groups"] == saved[0]["param_groups"]
    assert [float(moments["step"]) for moments in saved[1]["state"].values()] == [20] * 6


def test_the_state_is_new_and_the_one_given_stays():
    run = Run(FusedEngine, 20).advance(0, 10)
    given = run.state
    before = [part.clone() for part in given]
    run.advance(10)
    assert all(torch.equal(part, copy) for part, copy in zip(given, before))
    assert [part.shape for part in run.state] == [(1, 1, 16)] * 2
    assert not any(torch.equal(part, copy) for part, copy in zip(run.state, before))


def test_a_column_that_goes_silent_leaves_no_subnormal_moments():
    run = Run(FusedEngine, 2000)
    run.course.inputs[100:, 1] = 0
    run.advance()
    means = run.course.optimizer.state[run.course.model.lstm.weight_ih_l0]["exp_avg"]
    assert means[:, 1].count_nonzero() == 0 and means[:, 0].count_nonzero() == 64


@pytest.mark.parametrize(("real", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_sigmoid_and_tanh_are_those_of_torch(real, tolerance):
    x = np.concatenate([np.linspace(-120, 120, 2401), np.linspace(-1e-3, 1e-3, 201)]).astype(real)
    for ours, theirs in [(kernel._sigmoid, torch.sigmoid), (kernel._tanh, torch.tanh)]:
        exact = theirs(torch.tensor(x, dtype=torch.float64)).numpy()
        far = np.abs([ours(value) for value in x] - exact)
        assert (far <= tolerance * np.maximum(np.abs(exact), 1e-20)).all()
        assert np.isnan(ours(real(np.nan)))
