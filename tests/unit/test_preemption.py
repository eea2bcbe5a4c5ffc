"""Processes agree on stopping: at the same step, soon enough, and not at every fast step."""

import pytest
import torch

from train.engine import preemption
from train.engine.preemption import Preemption, Request


class Process:
    """A process that takes steps of so many seconds by a clock of its own."""

    def __init__(self, monkeypatch, exchanges, seconds):
        self.now, self.seconds = 0.0, seconds
        self.exchanges = exchanges  # of each exchange, what the processes brought, in their own tensors
        self.started = []  # steps at which this process started one
        self.step = 0
        self.patch = monkeypatch
        self._as_me(lambda: setattr(self, "preemption", Preemption(object())))

    def _as_me(self, work):
        self.patch.setattr(preemption.time, "monotonic", lambda: self.now)
        self.patch.setattr(preemption.dist, "get_rank", lambda: 0)
        self.patch.setattr(preemption.dist, "all_reduce", self._all_reduce)
        return work()

    def _all_reduce(self, value, operation, group, async_op):
        if len(self.started) == len(self.exchanges):
            self.exchanges.append([])
        present = self.exchanges[len(self.started)]
        present.append(value)
        self.started.append(self.step)

        class Work:
            def wait(self):
                largest = torch.stack(present).amax(0)
                for other in present:
                    other.copy_(largest)

        return Work()

    def agree(self, **options):
        self.step += 1
        self.now += self.seconds
        return self._as_me(lambda: self.preemption.agree(**options))


@pytest.fixture
def start(monkeypatch):
    def start(*seconds):
        exchanges = []
        return [Process(monkeypatch, exchanges, each) for each in seconds]

    return start


def test_slow_steps_agree_at_each_step_and_act_one_step_later(start):
    one, other = start(1.0, 1.0)
    assert [(one.agree(), other.agree()) for _ in range(3)] == [(Request.NOTHING, Request.NOTHING)] * 3
    other.preemption.wish = Request.STOP
    assert (one.agree(), other.agree()) == (Request.NOTHING, Request.NOTHING)
    assert (one.agree(), other.agree()) == (Request.STOP, Request.STOP)
    assert one.started == other.started == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("asked", range(1, 20))
def test_fast_steps_agree_now_and_then_and_all_act_at_the_same_step(start, asked):
    one, other = start(1 / 1024, 1 / 64)  # the slower one decides: 6 steps in 0.1 s
    acted = None
    for step in range(1, 200):
        if step == asked:
            one.preemption.wish = Request.STOP
        heard = one.agree(), other.agree()
        assert heard[0] == heard[1]
        if heard[0] is Request.STOP:
            acted = step
            break
    assert acted is not None and asked < acted <= asked + 6
    assert set(torch.tensor(one.started).diff().tolist()) <= {1, 6}
    assert one.started == other.started


def test_very_fast_steps_never_wait_for_more_than_the_bound(start):
    one, other = start(1e-6, 1e-6)
    for _ in range(200):
        one.agree(), other.agree()
    assert set(torch.tensor(one.started).diff().tolist()) == {preemption.MOST_STEPS}


def test_at_once_does_not_wait_for_its_turn(start):
    one, other = start(0.001, 0.001)
    for _ in range(3):
        one.agree(), other.agree()
    one.preemption.wish = Request.STOP
    assert [(one.agree(at_once=True), other.agree(at_once=True)) for _ in range(2)][1] == (Request.STOP, Request.STOP)


def test_batches_of_an_evaluation_do_not_pass_for_fast_steps(start):
    one, other = start(1.0, 1.0)
    one.agree(), other.agree()
    one.seconds = other.seconds = 0.001
    for _ in range(5):
        one.agree(at_once=True), other.agree(at_once=True)
    one.seconds = other.seconds = 1.0
    other.preemption.wish = Request.STOP
    assert [(one.agree(), other.agree()) for _ in range(2)][1] == (Request.STOP, Request.STOP)


def test_processes_that_slow_down_agree_at_each_step_again(start):
    one, other = start(0.001, 0.001)
    for _ in range(preemption.MOST_STEPS + 2):
        one.agree(), other.agree()
    other.seconds = 1.0
    for _ in range(2 * preemption.MOST_STEPS):
        one.agree(), other.agree()
    assert one.started[-3:] == [one.step - 2, one.step - 1, one.step]


def test_a_save_that_was_asked_for_again_while_they_agreed_happens_once(start):
    one, other = start(1.0, 1.0)
    heard = []
    for step in range(6):
        if step < 2:
            one.preemption.wish = Request.SAVE  # minutes have passed, and no save is in sight yet
        heard.append((one.agree(), other.agree()))
    assert heard.count((Request.SAVE, Request.SAVE)) == 1
    assert heard.count((Request.NOTHING, Request.NOTHING)) == 5
