"""The rules of a carried state, on each engine and on broken ones; which engine is chosen; the loop; the report."""

import copy
import inspect
import itertools
import json
import math
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from models.frequency_lstm import FrequencyLSTM
from train.engine.batching import Batching
from train.engine.errors import TrainingError, UsageError
from train.engine.run_directory import RunDirectory
from train.engine.runtime import start_runtime
from train.engine.session import Session
from train.engine.settings import check_settings
from train.engine.state import Progress, RunState
from train.stateful import choice, eager, report
from train.stateful.contract import SUMS, Course, DivergedError
from train.stateful.cuda_graph import CudaGraphEngine
from train.stateful.eager import EagerEngine
from train.stateful.loop import StatefulLoop
from train.stateful_lstm import StatefulSettings

SAMPLES, HIDDEN = 10, 6  # windows of 3 leave a short one


def build_fused(course):
    """Build the compiled engine; skip where what compiles it is not installed."""
    pytest.importorskip("numba", reason="numba is not installed: the compiled engine is not to be had")
    from train.stateful.fused import FusedEngine

    return FusedEngine(course)


@dataclass(frozen=True)
class Kind:
    """An engine under test."""

    build: Any
    dtype: torch.dtype
    tolerance: float


KINDS = {
    "eager float64": Kind(EagerEngine, torch.float64, 1e-12),
    "eager float32": Kind(EagerEngine, torch.float32, 1e-5),
    "graph float64": Kind(CudaGraphEngine, torch.float64, 1e-10),  # uncaptured on a CPU
    "graph float32": Kind(CudaGraphEngine, torch.float32, 1e-5),
    "fused float32": Kind(build_fused, torch.float32, 1e-5),  # in float64 it compiles for 20 seconds
}
on_each_engine = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
on_windows = pytest.mark.parametrize("window", [1, 3])


def make_course(dtype=torch.float32, window=1, max_grad_norm=1.0, samples=SAMPLES, columns=5, hidden=HIDDEN):
    """Return a course that is the same each time."""
    torch.manual_seed(3)
    model = FrequencyLSTM(columns, hidden).to(dtype)
    inputs, targets = torch.randn(samples, columns).to(dtype), torch.randn(samples, 1).to(dtype)
    return Course(model, torch.optim.Adam(model.parameters(), fused=True), inputs, targets, window, max_grad_norm)


def take(kind, course, cuts, rate=0.0, state=None):
    """Train in stretches between `cuts`; return the state after and the sums. Rates rise with every update."""
    engine, sums = kind.build(course), torch.zeros(SUMS, dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        updates = range(math.ceil(start / course.window), math.ceil(stop / course.window))
        state = engine.advance(start, stop, state, [rate * (1 + update / 8) for update in updates], sums)
    return state, sums


def everything(course):
    """Return copies of all weights and of all that the optimizer keeps, by name."""
    found = {}
    for name, parameter in course.model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in course.optimizer.state[parameter].items():
            found[f"{name} {key}"] = value.clone()
    return found


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def train_by_hand(course, rates, epochs):
    """Train in float64 with an LSTM cell, loops, and Adam as in the paper; return what `everything` does, and more."""
    lstm, head = course.model.lstm, copy.deepcopy(course.model.head).double()
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size).double()
    for mine, given in zip(cell.parameters(), lstm.parameters(), strict=True):
        mine.data.copy_(given.detach())
    parameters = [*cell.parameters(), *head.parameters()]
    means = [torch.zeros_like(parameter) for parameter in parameters]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    sums, step = torch.zeros(SUMS, dtype=torch.float64), 0
    for _ in range(epochs):
        hidden = memory = torch.zeros(1, lstm.hidden_size, dtype=torch.float64)
        first = 0
        while first < len(course.inputs):
            width = min(course.window, len(course.inputs) - first)
            error = torch.zeros((), dtype=torch.float64)
            for sample in range(first, first + width):
                hidden, memory = cell(course.inputs[sample].double()[None], (hidden, memory))
                error = error + (head(hidden)[0, 0] - course.targets[sample, 0].double()) ** 2
            gradients = torch.autograd.grad(error / width, parameters)
            hidden, memory = hidden.detach(), memory.detach()
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
            clipped = 0 < course.max_grad_norm < norm
            scale = course.max_grad_norm / (norm + 1e-6) if clipped else 1.0
            rate, step = rates[step], step + 1
            for parameter, gradient, mean, square in zip(parameters, gradients, means, squares):
                mean.mul_(0.9).add_(gradient * scale, alpha=0.1)
                square.mul_(0.999).add_((gradient * scale) ** 2, alpha=0.001)
                ratio = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
                parameter.data.sub_(rate * ratio)
            sums += torch.tensor([error.item(), width, norm, clipped, 1], dtype=torch.float64)
            first += width
    found = {}
    for (name, _), value, mean, square in zip(course.model.named_parameters(), parameters, means, squares, strict=True):
        found |= {name: value.detach(), f"{name} exp_avg": mean, f"{name} exp_avg_sq": square}
        found[f"{name} step"] = torch.tensor(float(step))
    return found, (hidden[None], memory[None]), sums


@on_each_engine
@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_two_epochs_equal_those_of_another_implementation(kind, window, max_grad_norm):
    course = make_course(kind.dtype, window, max_grad_norm)
    updates = math.ceil(SAMPLES / window)
    rates = [1e-2 * 0.9**update for update in range(2 * updates)]
    expected, state_by_hand, sums_by_hand = train_by_hand(course, rates, 2)
    engine, state, sums = kind.build(course), None, torch.zeros(SUMS, dtype=torch.float64)
    for epoch in range(2):
        state = engine.advance(0, SAMPLES, state, rates[epoch * updates : (epoch + 1) * updates], sums)
    assert_near(everything(course), expected, kind.tolerance)
    assert_near(state, state_by_hand, kind.tolerance)
    assert_near(sums, sums_by_hand, kind.tolerance)
    if window == 1:
        assert (0 < sums[3] < sums[4]) == (max_grad_norm > 0)  # of these some are clipped and some are not
    assert course.optimizer.param_groups[0]["lr"] == rates[-1]


# ---- the rules of the state, and that each test can fail -------------------------------------------------------------


@on_each_engine
@on_windows
def test_state_is_carried_between_samples(kind, window):
    one, other = make_course(kind.dtype, window), make_course(kind.dtype, window)
    other.inputs[0] += 1
    after, after_other = (take(kind, course, [0, SAMPLES])[0] for course in (one, other))
    for part, part_other in zip(after, after_other):
        assert not part.equal(part_other)  # the first sample is still felt after the last


@on_each_engine
@on_windows
def test_gradient_of_an_update_is_that_of_the_update_alone(kind, window):
    """The mean gradient of Adam, less what it was before, is the gradient of the last update."""
    for begin in range(window, SAMPLES, window):
        end = min(begin + window, SAMPLES)
        before, after = (make_course(kind.dtype, window, max_grad_norm=0) for _ in range(2))
        state, _ = take(kind, before, [0, begin])
        take(kind, after, [0, end])
        model = after.model
        outputs, _ = model(after.inputs[None, begin:end], tuple(part.detach() for part in state))
        loss = (outputs[0] - after.targets[begin:end]).square().mean()
        names, parameters = zip(*model.named_parameters())
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters)):
            mean, mean_before = (everything(course)[f"{name} exp_avg"] for course in (after, before))
            assert_near((mean - 0.9 * mean_before) / 0.1, gradient, 10 * kind.tolerance)


@on_each_engine
@on_windows
def test_state_starts_from_zeros_at_every_epoch(kind, window):
    course = make_course(kind.dtype, window)
    first, sums = take(kind, course, [0, SAMPLES])
    again, sums_again = take(kind, course, [0, SAMPLES], state=first)
    assert_equal(again, first)
    assert_equal(sums_again, sums)


@on_each_engine
@on_windows
def test_state_starts_from_zeros_nowhere_but_at_an_epoch(kind, window):
    """Cuts into stretches change no bit."""
    whole, parts = make_course(kind.dtype, window), make_course(kind.dtype, window)
    state, sums = take(kind, whole, [0, SAMPLES], rate=1e-2)
    state_parts, sums_parts = take(kind, parts, [0, 3, 6, 9, SAMPLES], rate=1e-2)
    assert_equal(state_parts, state)
    assert_equal(everything(parts), everything(whole))
    assert_near(sums_parts, sums, 1e-12 if kind.build is CudaGraphEngine else 0)  # it adds up each stretch by itself


@on_each_engine
@on_windows
def test_samples_come_in_the_order_of_time_and_each_once(kind, window):
    """With rate 0, training is one pass over the sequence with the same weights."""
    course = make_course(kind.dtype, window)
    with torch.no_grad():
        answers, passed = course.model(course.inputs[None], None)
    state, sums = take(kind, course, [0, SAMPLES])
    assert_near(state, passed, kind.tolerance)
    assert_near(sums[0], (answers[0] - course.targets).square().sum(), kind.tolerance)
    assert sums[1] == SAMPLES


@on_each_engine
@on_windows
def test_batch_is_of_one(kind, window):
    course = make_course(kind.dtype, window)
    state, sums = take(kind, course, [0, SAMPLES])
    updates = math.ceil(SAMPLES / window)
    assert [tuple(part.shape) for part in state] == [(1, 1, HIDDEN)] * 2
    assert sums[4] == updates
    assert {float(values["step"]) for values in course.optimizer.state.values()} == {updates}


RESET = "if sample == 0:"
EACH = "enumerate(range(start, stop, course.window))"
DETACH = "state = state[0].detach(), state[1].detach()"
BROKEN = {
    "reset between samples": (test_state_is_carried_between_samples, {RESET: "if True:"}),
    "not detached": (test_gradient_of_an_update_is_that_of_the_update_alone, {DETACH: "pass"}),
    "h not detached": (
        test_gradient_of_an_update_is_that_of_the_update_alone,
        {DETACH: "state = state[0], state[1].detach()"},
    ),
    "gradient of two updates": (test_gradient_of_an_update_is_that_of_the_update_alone, {"optimizer.zero_grad()": ""}),
    "no reset at the start of an epoch": (test_state_starts_from_zeros_at_every_epoch, {RESET: "if False:"}),
    "reset at the start of a stretch": (
        test_state_starts_from_zeros_nowhere_but_at_an_epoch,
        {RESET: "if update == 0:"},
    ),
    "backwards after the first": (
        test_samples_come_in_the_order_of_time_and_each_once,
        {EACH: "enumerate(sorted(range(start, stop, course.window), key=lambda sample: -sample % stop))"},
    ),
    "first sample twice": (
        test_samples_come_in_the_order_of_time_and_each_once,
        {EACH: "enumerate([start, *range(start, stop, course.window)])", "rates[update]": "rates[0]"},
    ),
    "batch of two": (
        test_batch_is_of_one,
        {
            EACH: "enumerate(range(start, stop, 2 * course.window))",
            "sample + course.window": "sample + 2 * course.window",
            "course.inputs[None, now]": "course.inputs[now].unflatten(0, (2, -1))",
            "course.targets[None, now]": "course.targets[now].unflatten(0, (2, -1))",
        },
    ),
}


def rebuild_eager(replacements):
    """Return the reference, made from its source with other lines."""
    source = inspect.getsource(eager)
    for old, new in replacements.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = types.ModuleType("broken")
    exec(compile(source, "broken", "exec"), module.__dict__)
    return Kind(module.EagerEngine, torch.float64, 1e-12)


@pytest.mark.parametrize("name", BROKEN)
@on_windows
def test_each_rule_fails_on_an_engine_that_breaks_it(name, window):
    rule, replacements = BROKEN[name]
    rule(rebuild_eager({}), window)
    # Where nothing is detached, autograd itself objects.
    with pytest.raises(RuntimeError if "not detached" in name else AssertionError):
        rule(rebuild_eager(replacements), window)


# ---- engines against each other --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KINDS["graph float64"], KINDS["graph float32"], KINDS["fused float32"]])
@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("cuts", [[0, 122], [0, 21, 77, 122]])
def test_fast_engines_agree_with_the_reference(kind, window, max_grad_norm, cuts):
    """122 samples: a graph of 16 updates, single ones, and a short last window."""
    course, reference = (make_course(kind.dtype, window, max_grad_norm, 122, 3, 5) for _ in range(2))
    state, sums = take(kind, course, cuts, rate=1e-3)
    state_of_it, sums_of_it = take(Kind(EagerEngine, kind.dtype, 0), reference, [0, 122], rate=1e-3)
    found, expected = everything(course), everything(reference)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
    assert_near(found, expected, kind.tolerance)
    assert_near(state, state_of_it, kind.tolerance)
    assert_near(sums, sums_of_it, kind.tolerance)
    assert course.optimizer.param_groups[0]["lr"] == reference.optimizer.param_groups[0]["lr"]


@on_each_engine
@on_windows
@pytest.mark.parametrize(
    ("column", "value"), [("targets", math.nan), ("targets", math.inf), ("inputs", math.nan), ("targets", "vast")]
)
def test_an_update_that_is_not_finite_leaves_all_as_after_the_last_good_one(kind, window, column, value):
    course, good = make_course(kind.dtype, window), make_course(kind.dtype, window)
    if value == "vast":  # its square is infinite
        value = torch.finfo(kind.dtype).max ** 0.6
    getattr(course, column)[7] = value
    last_good = 7 // window
    _, expected = take(kind, good, [0, last_good * window], rate=1e-2)
    engine, sums = kind.build(course), torch.zeros(SUMS, dtype=torch.float64)
    rates = [1e-2 * (1 + update / 8) for update in range(math.ceil(SAMPLES / window))]
    with pytest.raises(DivergedError) as caught:
        engine.advance(0, SAMPLES, None, rates, sums)
    assert caught.value.updates == last_good
    assert_equal(everything(course), everything(good))
    assert_equal(sums, expected)


def test_the_fast_engine_takes_odd_sizes():
    for columns, hidden, window in ((1, 1, 1), (2, 3, 5), (9, 13, 1), (4, 7, 2)):
        course, reference = (make_course(torch.float32, window, 1.0, 12, columns, hidden) for _ in range(2))
        state, _ = take(KINDS["fused float32"], course, [0, 12], rate=1e-3)
        expected, _ = take(KINDS["eager float32"], reference, [0, 12], rate=1e-3)
        assert_near(everything(course), everything(reference), 1e-5)
        assert_near(state, expected, 1e-5)


# ---- which engine is chosen ------------------------------------------------------------------------------------------


class Spoiled(EagerEngine):
    """Does what the reference does, and then something else."""

    def advance(self, *arguments):
        state = super().advance(*arguments)
        with torch.no_grad():
            return self.spoil(self._course, state)


def spoil_weight(course, state):
    course.model.lstm.weight_hh_l0.mul_(1.01)
    return state


def spoil_bias(course, state):
    course.model.head.bias.fill_(math.nan)
    return state


def spoil_state(course, state):
    return state[0], state[1] * 1.01


def spoil_last_number(course, state):
    return state[0], torch.cat([state[1][..., :-1], state[1][..., -1:] * math.nan], dim=-1)


def spoil_nothing(course, state):
    return state


def cannot_be_built(course):
    raise OSError("no compiler\nmore lines")


def offer(monkeypatch, build):
    """Let `build` be the fast engine."""
    monkeypatch.setattr(choice, "_import_fast", lambda device: (build, "a kernel of the test"))


def spoiled(spoil):
    return type("Spoiled", (Spoiled,), {"spoil": staticmethod(spoil)})


def test_eager_is_taken_when_asked_for(monkeypatch):
    offer(monkeypatch, cannot_be_built)
    name, build, line = choice.choose_engine("eager", make_course())
    assert (name, build) == ("eager", EagerEngine) and "eager" in line


@pytest.mark.parametrize("wish", ["auto", "fused"])
def test_a_fast_engine_that_agrees_is_taken(monkeypatch, wish):
    build = spoiled(spoil_nothing)
    offer(monkeypatch, build)
    name, chosen, line = choice.choose_engine(wish, make_course())
    assert (name, chosen) == ("fused", build)
    assert "a kernel of the test" in line and "0.0e+00 from the reference" in line


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (cannot_be_built, "OSError: no compiler"),
        (spoiled(spoil_weight), "1.0e-02 away from the reference"),
        (spoiled(spoil_state), "1.0e-02 away from the reference"),
        (spoiled(spoil_bias), "nan away from the reference"),
        (spoiled(spoil_last_number), "nan away from the reference"),
    ],
    ids=["cannot be built", "weight wrong by 1 %", "state wrong by 1 %", "NaN in a weight", "NaN in the state"],
)
def test_a_fast_engine_that_fails_or_differs_is_refused_with_the_reason(monkeypatch, build, reason):
    offer(monkeypatch, build)
    name, chosen, line = choice.choose_engine("auto", make_course())
    assert (name, chosen) == ("eager", EagerEngine)
    assert reason in line and "\n" not in line
    with pytest.raises(UsageError, match="--engine fused is not to be had here") as caught:
        choice.choose_engine("fused", make_course())
    assert reason in str(caught.value)


@pytest.mark.parametrize("window", [1, 3, 64])
def test_the_trial_leaves_what_will_be_trained_as_it_is(monkeypatch, window):
    course = make_course(window=window)
    take(KINDS["eager float32"], course, [0, SAMPLES], rate=1e-2)
    before, generator = everything(course), torch.get_rng_state()
    groups = copy.deepcopy(course.optimizer.state_dict()["param_groups"])
    offer(monkeypatch, spoiled(spoil_weight))
    choice.choose_engine("auto", course)
    assert_equal(everything(course), before)
    assert course.optimizer.state_dict()["param_groups"] == groups
    assert torch.get_rng_state().equal(generator)


def test_the_compiled_engine_passes_its_trial():
    pytest.importorskip("numba", reason="numba is not installed: the compiled engine is not to be had")
    name, _, line = choice.choose_engine("fused", make_course(hidden=64, samples=40))
    assert name == "fused" and "one compiled kernel" in line


# ---- the report ------------------------------------------------------------------------------------------------------


def test_answers_in_stretches_are_those_of_one_pass(monkeypatch):
    course = make_course(torch.float64, samples=50)
    with torch.no_grad():
        expected = course.model(course.inputs[None], None)[0][0]
    for stretch in (1, 7, 50, 8192):
        monkeypatch.setattr(report, "STRETCH", stretch)
        answers = report.predict(course.model, course.inputs)
        assert answers.shape == (50, 1) and not answers.requires_grad
        assert_near(answers, expected, 1e-12)


def test_score_is_the_mean_of_squared_errors_of_all_and_of_each_group():
    answers, targets = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[1.0], [1.0], [5.0], [1.0]])
    groups = {"1 Hz": torch.tensor([0, 1]), "low": torch.tensor([3])}
    assert report.score(answers, targets, groups) == {"loss": 3.5, "loss/1_Hz": 0.5, "loss/low": 9.0}
    assert report.score(answers, targets, {}) == {"loss": 3.5}


def test_score_is_computed_in_float64():
    """In float32 the square of each error would be rounded, and their sum."""
    torch.manual_seed(0)
    answers, targets = torch.randn(1000, 1), torch.randn(1000, 1)
    expected = math.fsum((float(one) - float(other)) ** 2 for one, other in zip(answers, targets)) / 1000
    assert report.score(answers, targets, {})["loss"] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("groups", [{}, {"1 Hz": torch.arange(5), "3 Hz": torch.arange(5, 2300)}])
def test_answers_are_drawn(tmp_path, groups):
    report.draw_answers(tmp_path / "answers.png", torch.zeros(2300, 1), torch.ones(2300, 1), groups, "title")
    assert (tmp_path / "answers.png").read_bytes()[:4] == b"\x89PNG"


def test_history_holds_each_finished_epoch(tmp_path):
    lines = [
        {"step": 5, "epoch": 0.5, "train/loss": 9.0, "perf/train_seconds": 1.0},
        {"step": 10, "epoch": 1.0, "train/loss": 7.0, "train/epoch_loss": 8.0, "perf/train_seconds": 2.5},
        {"step": 15, "epoch": 1.5, "train/loss": 6.0, "val/loss": 0.1, "perf/train_seconds": 3.0},
        {"step": 20, "epoch": 2.0, "train/epoch_loss": 5.0, "val/loss": 0.25, "perf/train_seconds": 7.0},
        {"step": 20, "test/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "tr')
    report.write_history(RunDirectory(tmp_path))
    assert json.loads((tmp_path / "training_history.json").read_text())["epochs"] == [
        {"epoch": 1, "loss": 8.0, "seconds": 2.5},
        {"epoch": 2, "loss": 5.0, "seconds": 4.5, "val_loss": 0.25},
    ]


# ---- the loop --------------------------------------------------------------------------------------------------------


class Log:
    """Takes the lines of metrics."""

    error, position = None, 0

    def __init__(self):
        self.lines = []

    def log(self, step, values):
        self.lines.append((step, values))

    def values(self):
        """Return the lines without what depends on the clock and on memory."""
        return [(step, {k: v for k, v in line.items() if not k.startswith("perf/")}) for step, line in self.lines]


class Watched(EagerEngine):
    """Notes the stretches that it is given."""

    def __init__(self, course):
        super().__init__(course)
        self.stretches = []

    def advance(self, start, stop, state, rates, sums):
        self.stretches.append((start, stop, list(rates)))
        return super().advance(start, stop, state, rates, sums)


def make_loop(course, engine=None, scores=None, progress=None, **settings):
    settings = StatefulSettings(tracker=("none",), window=course.window, **settings)
    runtime = start_runtime(settings)
    state = RunState(course.model, course.optimizer, progress or Progress(slots=1))
    evaluate = None if scores is None else lambda: {"loss": next(scores)}
    session = Session(None, None, Batching(1, 1, 1))
    return StatefulLoop(
        settings=settings,
        runtime=runtime,
        session=session,
        state=state,
        course=course,
        engine=engine or EagerEngine(course),
        evaluate=evaluate,
        tracker=Log(),
        data={},
    )


INTERVALS = [
    {},
    {"log_every": 1},
    {"log_every": 4, "eval_every": "3", "checkpoint_every": "5"},
    {"log_every": 7, "eval_every": "1 epoch", "checkpoint_every": "2 epochs"},
    {"log_every": 1000, "eval_every": "11", "checkpoint_every": "10 minutes"},
    {"log_every": 6, "checkpoint_every": "4", "max_train_steps": 29},
]


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("most_samples", [1, 8, 1000])
def test_stretches_end_where_something_is_due(intervals, window, most_samples):
    course = make_course(window=window, samples=20)
    engine, settings = Watched(course), {"num_train_epochs": 3, "lr_scheduler": "linear", **intervals}
    engine.most_samples = most_samples
    loop = make_loop(course, engine, itertools.count(1.0), **settings)
    saved = []
    loop.saver.save = lambda: saved.append(loop.state.progress.step)
    loop.train()

    an_epoch = math.ceil(20 / window)
    total = min(3 * an_epoch, loop.settings.max_train_steps or 1000)

    def due(text):
        every = {"1 epoch": an_epoch, "2 epochs": 2 * an_epoch, "10 minutes": 10**9}.get(text) or int(text)
        return {step for step in range(1, total + 1) if step % every == 0} | {total}

    evaluated, ends = due(loop.settings.eval_every), {*range(an_epoch, total + 1, an_epoch)}
    logged = due(loop.settings.log_every) | evaluated | ends
    assert [step for step, _ in loop.tracker.lines] == sorted(logged)
    assert [step for step, line in loop.tracker.lines if "val/loss" in line] == sorted(evaluated)
    assert [step for step, line in loop.tracker.lines if "train/epoch_loss" in line] == sorted(ends)
    assert saved == sorted(due(loop.settings.checkpoint_every) | {min(evaluated)})  # the first is the best

    samples = [sample for start, stop, _ in engine.stretches for sample in range(start, stop)]
    epochs, rest = divmod(total, an_epoch)
    assert samples == [*range(20)] * epochs + [*range(min(20, rest * window))]
    rates = [rate for _, _, part in engine.stretches for rate in part]
    assert rates == pytest.approx([1e-3 * (1 - step / total) for step in range(total)])
    for start, stop, part in engine.stretches:
        assert len(part) == math.ceil((stop - start) / window) and (len(part) == 1 or stop - start <= most_samples)
    progress = loop.state.progress
    assert (progress.step, progress.epoch, progress.samples_seen, progress.finished) == (
        total, epochs, len(samples), True,
    )  # fmt: skip
    assert progress.sample == min(20, rest * window) % 20


@pytest.mark.parametrize("window", [1, 3])
def test_how_the_sequence_is_cut_changes_no_bit(window):
    results = []
    for most_samples in (1, 4, 1000):
        course = make_course(window=window, samples=20)
        loop = make_loop(course, num_train_epochs=2, log_every=6)
        loop.engine.most_samples = most_samples
        loop.train()
        results.append((everything(course), loop.state.carried, loop.tracker.values()))
    for weights, carried, lines in results[1:]:
        assert_equal(weights, results[0][0])
        assert_equal(carried, results[0][1])
        assert lines == results[0][2]


def test_metrics_are_those_of_training_by_hand():
    course, by_hand = make_course(torch.float64, samples=20), make_course(torch.float64, samples=20)
    _, _, sums = train_by_hand(by_hand, [1e-3] * 20, 1)
    loop = make_loop(course, num_train_epochs=2, log_every=8)
    loop.state.carried = {name: value.double() for name, value in loop.state.carried.items()}
    loop.train()
    lines = dict(loop.tracker.values())
    assert lines[20]["train/epoch_loss"] == pytest.approx(float(sums[0] / 20), rel=1e-10)
    parts = [lines[8]["train/loss"] * 8, lines[16]["train/loss"] * 8, lines[20]["train/loss"] * 4]
    assert sum(parts) == pytest.approx(float(sums[0]), rel=1e-10)
    norms = [lines[8]["train/grad_norm"] * 8, lines[16]["train/grad_norm"] * 8, lines[20]["train/grad_norm"] * 4]
    assert sum(norms) == pytest.approx(float(sums[2]), rel=1e-10)
    assert lines[40]["train/epoch_loss"] < lines[20]["train/epoch_loss"]  # of the second epoch alone
    assert (lines[8]["epoch"], lines[20]["epoch"], lines[40]["epoch"]) == (0.4, 1, 2)


def test_statistics_of_the_state_and_memory_are_as_by_hand(monkeypatch):
    loop = make_loop(make_course(hidden=4))
    loop.state.carried["hidden"] = torch.tensor([[[0.96, -0.97, 0.5, 0.01]]])
    loop.state.carried["cell"] = torch.tensor([[[3.0, -1.8, -0.96, 0.0]]])  # tanh: 0.995, -0.947, -0.744, 0
    loop.state.window.copy_(torch.tensor([6.0, 3.0, 4.5, 1.0, 3.0]))
    memory = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(rss=123 * 2**20))
    monkeypatch.setattr("train.stateful.loop.psutil.Process", lambda: memory)
    values = loop._training_values(False)
    expected = {
        "train/loss": 2,
        "train/grad_norm": 1.5,
        "train/clip_rate": 1 / 3,
        "state/hidden_mean": 0.125,
        "state/hidden_std": math.sqrt((0.96**2 + 0.97**2 + 0.5**2 + 0.01**2) / 4 - 0.125**2),
        "state/hidden_max": 0.97,
        "state/hidden_saturation": 0.5,
        "state/cell_mean": 0.06,
        "state/cell_std": math.sqrt((9 + 1.8**2 + 0.96**2) / 4 - 0.06**2),
        "state/cell_max": 3,
        "state/cell_saturation": 0.25,
        "perf/memory_mb": 123,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert loop.state.window.tolist() == [0] * SUMS
    assert loop.state.carried["epoch"].tolist() == [6, 3, 4.5, 1, 3]


def test_best_is_the_lowest_finite_score_and_the_plateau_counts_the_others():
    scores = [math.nan, 3.0, 4.0, 2.0, math.inf, 2.0]
    course = make_course(samples=6)
    settings = {"num_train_epochs": 1, "eval_every": "1", "lr_scheduler": "plateau", "lr_patience": 0}
    loop = make_loop(course, scores=iter(scores), checkpoint_every="10 minutes", **settings)
    saved = []
    loop.saver.save = lambda: saved.append(loop.state.progress.step)
    loop.train()
    assert saved == [2, 4, 6]  # two that are better, and the end
    assert (loop.state.progress.best_value, loop.state.progress.best_step) == (2.0, 4)
    rates = [line["train/learning_rate"] for _, line in loop.tracker.lines]
    assert rates == pytest.approx([1e-3 * 0.5**bad for bad in (0, 1, 1, 2, 2, 3)])


@pytest.mark.parametrize(("window", "update", "row"), [(1, 8, 7), (3, 3, 6)])
def test_divergence_names_update_row_and_rate(window, update, row):
    course = make_course(window=window)
    course.targets[7] = math.nan
    with pytest.raises(TrainingError) as caught:
        make_loop(course, learning_rate=0.02).train()
    assert f"update {update}, from row {row} of the data on" in str(caught.value)
    assert "learning rate 0.02" in str(caught.value)


@pytest.mark.parametrize(("window", "sample"), [(1, 20), (1, 45), (7, 6), (7, 15)])
def test_a_checkpoint_where_no_update_begins_is_refused(window, sample):
    """It is of longer data, or of another window, and the user has agreed to the change."""
    with pytest.raises(UsageError, match=f"at sample {sample} of an epoch"):
        make_loop(make_course(window=window, samples=20), progress=Progress(slots=1, step=50, sample=sample))
    make_loop(make_course(window=window, samples=20), progress=Progress(slots=1, step=50, sample=14))


# ---- settings, model, launchers --------------------------------------------------------------------------------------


def test_settings_out_of_range_are_named():
    settings = StatefulSettings(hidden_size=0, window=0, validation_data="a.npy", test_data="b.npy")
    problems = check_settings(settings)
    assert len(problems) == 4
    for name, problem in zip(("hidden_size", "window", "validation_data", "test_data"), problems):
        assert problem.startswith(f"--{name} ")
    assert check_settings(StatefulSettings(data="a.npy", test_data="b.npy")) == []


def test_the_model_counts_its_parameters():
    model = FrequencyLSTM()
    assert model.summary() == "LSTM(5 -> 64) 18,176 + Linear(64 -> 1) 65 = 18,241 parameters"
    assert sum(parameter.numel() for parameter in model.parameters()) == 18_241


def test_plateau_needs_a_loss_to_follow():
    alone = StatefulSettings(data="rows.npy", lr_scheduler="plateau")
    assert ["--lr_scheduler plateau" in problem for problem in check_settings(alone)] == [True]
    assert check_settings(StatefulSettings(lr_scheduler="plateau")) == []
    assert check_settings(StatefulSettings(data="a.npy", validation_data="b.npy", lr_scheduler="plateau")) == []
