"""Preflight's parts: leaving no trace, choosing samples, carrying checks out, and the report."""

import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.subjects import classify_subject, statuses
from train.engine import preflight
from train.engine.checks.finding import Finding, judge, listing, skip
from train.engine.checks.report import Report, draw_report, write_report
from train.engine.checks.subject import trial, without_trace
from train.engine.errors import TrainingError, UsageError
from train.engine.preflight import FULL, MACHINE, QUICK, examine
from train.engine.randomness import capture_rng


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 10)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return classify_subject(tmp_path_factory.mktemp("run"), build=lambda *_: Normed(), ema_decay=0.9)


def everything(subject):
    """Return all that a check could change, as values to compare."""
    model, optimizer = subject.state.model, subject.state.optimizer
    return {
        **{f"model {name}": value.clone() for name, value in model.state_dict().items()},
        **{f"ema {name}": value.clone() for name, value in (subject.state.ema or {}).items()},
        **{f"rng {name}": value for name, value in capture_rng(subject.runtime.device).items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "optimizer": [len(optimizer.state), [group["lr"] for group in optimizer.param_groups]],
        "progress": dataclasses.asdict(subject.state.progress),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def use_everything(subject):
    """Do all that a check that does not train may do."""
    torch.rand(3), random.random(), np.random.rand()
    subject.state.model.eval()
    subject.state.model.layers[2].train()
    subject.losses(subject.samples(32))["loss"].mean().backward()
    subject.state.progress.stream = {"block": 3}


def test_without_trace_puts_all_back_but_weights(subject):
    before = everything(subject)
    with without_trace(subject):
        use_everything(subject)
        assert not torch.equal(before["model layers.2.running_mean"], subject.state.model.layers[2].running_mean)
    assert_same(before, everything(subject))


def test_without_trace_puts_all_back_after_an_error(subject):
    before = everything(subject)
    manager = without_trace(subject)
    manager.__enter__()
    use_everything(subject)
    error = RuntimeError()
    assert not manager.__exit__(RuntimeError, error, None)
    assert_same(before, everything(subject))


def test_trial_puts_weights_and_optimizer_back(subject):
    before = everything(subject)
    with trial(subject) as snapshot:
        for _ in range(2):
            use_everything(subject)
            subject.state.optimizer.step()
            subject.state.progress.step += 1
            subject.state.ema = {name: value * 2 for name, value in subject.state.ema.items()}
            assert not torch.equal(before["model layers.1.weight"], subject.state.model.layers[1].weight)
            snapshot.restore()
            assert torch.equal(before["model layers.1.weight"], subject.state.model.layers[1].weight)
    assert_same(before, everything(subject))


@pytest.mark.parametrize("checks", [QUICK, FULL], ids=["quick", "full"])
def test_all_checks_together_leave_no_trace(subject, checks):
    before = everything(subject)
    examine(subject, [check for check in checks if check is not preflight.check_speed])
    assert_same(before, everything(subject))


def test_samples_are_distinct_repeat_and_go_all_over_the_split(subject):
    seen = []
    load = subject.task.load
    watched = dataclasses.replace(
        subject,
        task=dataclasses.replace(subject.task, load=lambda *arguments: seen.append(arguments[1]) or load(*arguments)),
    )
    total = len(subject.task.splits["train"])
    for first in range(0, total, 64):
        watched.samples(64, first=first)
    numbers = torch.cat(seen)[:total]
    assert numbers.sort().values.tolist() == list(range(total))
    assert numbers[:64].float().std() > total / 5
    watched.samples(64)
    assert seen[-1].tolist() == seen[0].tolist()


def test_samples_are_no_more_than_a_forward_pass_of_the_run_takes(tmp_path):
    subject = classify_subject(tmp_path, micro_batch_size=4)
    assert len(subject.samples(64)["labels"]) == 4
    assert len(classify_subject(tmp_path, micro_batch_size=1).samples(64)["labels"]) == 2


def test_an_error_in_a_check_is_a_finding_and_the_next_is_carried_out(subject):
    def check_the_sky(subject):
        yield judge("colour", True, "blue", "blue")
        raise ZeroDivisionError("no clouds\nat all")

    report = examine(subject, [check_the_sky, preflight.check_optimizer])
    assert statuses(report.findings) == {
        "colour": "pass", "the sky": "fail", "optimizer": "pass", "hidden parameters": "pass",
        "frozen parameters": "pass",
    }  # fmt: skip
    place = f"{os.path.relpath(__file__)}:{check_the_sky.__code__.co_firstlineno + 2}"
    assert report.findings[1].measured == f"ZeroDivisionError: no clouds ({place})"


def test_the_same_error_again_is_one_alarm(subject):
    def broken():
        raise KeyError("inputs")

    def check_one(subject):
        broken()

    def check_two(subject):
        broken()

    report = examine(subject, [check_one, check_two])
    assert statuses(report.findings) == {"one": "fail", "two": "skip"}


def test_a_finding_may_stop_what_comes_after(subject):
    def check_first(subject):
        yield judge("first", False, "9 outputs", "10 outputs", ("build it with 10",), stop=True)

    report = examine(subject, [check_first, preflight.check_optimizer])
    assert [finding.check for finding in report.findings] == ["first"]


def test_bad_usage_is_not_swallowed(subject):
    def check_usage(subject):
        raise UsageError("--slots 3: no")

    with pytest.raises(UsageError):
        examine(subject, [check_usage])


def test_quick_is_a_part_of_full_and_trains_nothing():
    assert set(MACHINE) < set(QUICK) < set(FULL)
    assert preflight.check_overfit not in QUICK and preflight.check_step not in QUICK


def test_weights_that_start_at_zero_raise_no_alarm(tmp_path):
    """A residual branch that starts as nothing has no gradient inside at first."""

    class Residual(Normed):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(64, 32), nn.Linear(32, 64)
            nn.init.zeros_(self.outer.weight)

        def forward(self, x):
            return self.layers(x.flatten(1) + self.outer(self.inner(x.flatten(1))))

    subject = classify_subject(tmp_path, build=lambda *_: Residual())
    assert statuses(examine(subject, [preflight.check_gradients]).findings)["gradient flow"] == "pass"


def test_too_few_samples_of_validation_are_said_not_judged(tmp_path):
    subject = classify_subject(tmp_path, dataset="wine", model="mlp")
    splits = {**subject.task.splits, "validation": range(19)}
    subject.task = dataclasses.replace(subject.task, splits=splits)
    (finding,) = preflight.check_learning(subject)
    assert finding.status == "skip" and "20 are needed" in finding.measured


FINDINGS = (
    judge("inputs", True, "mean 0 | std 1", "normalised"),
    judge("step size", False, "1e-9", "1e-6 or more", ("raise it", "look"), values_of=3),
    judge("frozen", False, "2", "none", ("thaw",), otherwise="warn"),
    skip("round trip", "a dry run writes nothing"),
)


def test_report_says_all(tmp_path):
    report = Report("full", FINDINGS, 1.25, {"command": "train.py --seed 1", "settings": {"seed": 1}})
    assert report.failed
    assert report.verdict() == "preflight full: 1 passed, 1 to look at, 1 failed, 1 skipped, 1.2 s"
    table = report.table()
    assert "FAIL  step size   1e-9\n" in table
    assert "  FAIL step size: 1e-9  (expected: 1e-6 or more)" in table
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["preflight.md", "preflight.json"]
    kept = json.loads((tmp_path / "preflight.json").read_text())
    assert kept["start"]["settings"] == {"seed": 1}
    assert kept["failed"] and kept["findings"][1]["values"] == {"values_of": 3}
    text = (tmp_path / "preflight.md").read_text()
    assert "- command: train.py --seed 1\n" in text
    assert "| pass | inputs | mean 0 \\| std 1 | normalised | 0.00 |" in text
    assert "## step size\n\nLikely causes, the likeliest first:\n\n1. raise it\n2. look\n" in text


def test_report_without_failures():
    report = Report("quick", FINDINGS[:1], 0.5)
    assert not report.failed
    assert report.summary() == "preflight quick: 1 passed, 0.5 s"


def test_summary_of_quick_says_how_to_look_closer_and_how_to_leave_it():
    summary = Report("quick", FINDINGS, 0.5).summary()
    assert "--preflight looks closer" in summary and "--preflight off" in summary


def test_picture_of_gradients_and_curve(tmp_path):
    findings = (
        Finding("gradient flow", "pass", "", "", values={"norms": {"a.weight": 0.0, "b.weight": 2.0}}),
        Finding("overfit one batch", "pass", "", "", values={"curve": [2.3, 1.0, 0.1]}),
    )
    assert draw_report(Report("full", findings, 1.0), tmp_path / "preflight.png")
    assert (tmp_path / "preflight.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_report(Report("full", findings[:1], 1.0), tmp_path / "other.png")


def test_long_lists_are_cut():
    assert listing(["a", "b"]) == "a, b"
    assert listing(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_a_report_that_cannot_be_written_stops_no_run(subject, monkeypatch, capsys):
    def full(report, run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preflight, "write_report", full)
    preflight.warn(subject)
    assert "preflight.md cannot be written: No space left on device" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="No space left on device"):
        preflight.preflight(
            dataclasses.replace(subject, settings=dataclasses.replace(subject.settings, preflight="lr"))
        )
