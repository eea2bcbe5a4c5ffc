"""The queue between training and W&B."""

import os
import threading
from types import SimpleNamespace

import pytest
import wandb  # noqa: F401  # imported here, not by the thread against the clock

from train.engine import wandb_tracker
from train.engine.errors import UsageError
from train.engine.settings import RunSettings
from train.engine.wandb_tracker import WandbTracker, check_variables


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """A tracker that gives up soon, with nobody behind it."""
    monkeypatch.setattr(wandb_tracker, "MOST_WAITING", 2)
    monkeypatch.setattr(wandb_tracker, "PATIENCE_SECONDS", 1)
    tracker = WandbTracker(SimpleNamespace(plots=tmp_path), RunSettings(), {})
    tracker._seconds = 0.1
    return tracker


def test_training_goes_on_while_lines_wait_and_gives_up_when_too_many_do(tracker):
    hung = threading.Event()
    tracker.run = SimpleNamespace(log=lambda *_, **__: hung.wait())
    tracker._thread.start()
    for step in range(3):  # one is being taken, two wait
        tracker.log({"train/loss": 1.0}, step)
    with pytest.raises(TimeoutError, match="it takes nothing, and 2 lines wait"):
        tracker.log({"train/loss": 1.0}, 3)
    hung.set()


def test_finish_does_not_wait_for_what_hangs(tracker):
    hung = threading.Event()
    tracker.run = SimpleNamespace(finish=hung.wait)
    tracker._thread.start()
    with pytest.raises(TimeoutError, match="not everything was taken"):
        tracker.finish()
    hung.set()


def test_lines_are_sent_in_order_and_once(tracker):
    sent = []
    tracker.run = SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)
    tracker._sent = 1
    tracker._thread.start()
    tracker._seconds = 10
    for step in (1, 2, 2, 3):
        tracker.log({"train/loss": float(step)}, step)
    tracker.finish()
    assert sent == [(2, {"train/loss": 2.0}), (3, {"train/loss": 3.0})]


def test_failure_is_raised_by_the_next_call(tracker):
    def fail(*_, **__):
        raise RuntimeError("no such luck")

    tracker.run = SimpleNamespace(log=fail)
    tracker._thread.start()
    tracker.log({}, 1)
    tracker._thread.join(10)
    with pytest.raises(RuntimeError, match="no such luck"):
        tracker.log({}, 2)
    with pytest.raises(RuntimeError, match="no such luck"):
        tracker.finish()


# ---- variables of W&B ------------------------------------------------------------------------------------------------


def test_variables_that_wandb_refuses_are_named_at_once(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    monkeypatch.setenv("WANDB_BASE_URL", "garbage")
    with pytest.raises(UsageError) as caught:
        check_variables(RunSettings(wandb_project="a/b"))
    problems = caught.value.problems
    assert [problem.split(": W&B refuses it (")[0] for problem in sorted(problems)] == [
        "--wandb_project a/b", "WANDB_BASE_URL=garbage", "WANDB_MODE=of",
    ]  # fmt: skip
    assert "'online', 'offline'" in str(problems) and "pydantic" not in str(problems)


def test_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    check_variables(RunSettings())
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize(("rank", "tracker"), [("1", ("wandb",)), ("0", ("none",))])
def test_variables_are_not_looked_at_where_they_are_not_used(monkeypatch, rank, tracker):
    monkeypatch.setenv("WANDB_MODE", "of")
    monkeypatch.setenv("RANK", rank)
    check_variables(RunSettings(tracker=tracker))
