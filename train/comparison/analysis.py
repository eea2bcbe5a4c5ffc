"""The numbers of a comparison: values of the metric, groups of seeds, differences and what they say."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

from train.comparison.run import HARMLESS, Run
from train.engine.errors import UsageError
from train.engine.settings import lower_is_better

Mode = Literal["min", "max"]
Point = tuple[int, float]  # step, value

SAMPLES_OF_A_STEP = {"batch_size", "window"}  # settings that say how many samples a step uses
HIGHER = re.compile(r"(ema_)?(.*_)?(accuracy|psnr|ssim|f1|auc|precision|recall)")


@dataclass(frozen=True)
class Measured:
    """A run and its values of the metric."""

    run: Run
    curve: list[Point]
    best: Point | None  # None: nothing but NaN
    last: Point
    at_equal: float | None  # at the step that all have


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed, and without copies of a run."""

    label: str  # the settings that tell it from the others
    members: list[Measured]
    values: list[float]  # that are compared, of the members that have a finite one

    @property
    def mean(self) -> float:
        return mean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """The best group against another one; positive: better by so much."""

    better: Group
    worse: Group
    value: float
    interval: tuple[float, float] | None  # 95 %; None: one of them has but one run, or none varies


def choose_metric(runs: Sequence[Run], metric: str | None) -> str:
    """Return the metric asked for, else the best_metric of the runs, else val/loss.

    Raises:
        UsageError: a run has not this metric.
    """
    if metric is None:
        wishes = {str(wish) for run in runs if (wish := run.config.get("best_metric"))}
        if len(wishes) > 1:
            raise UsageError(f"the runs have different best_metric ({', '.join(sorted(wishes))}): choose with --metric")
        metric = next(iter(wishes), "val/loss")
    missing = [f"{run.source}: has no {metric}, but {', '.join(run.metrics)}" for run in runs if not run.curve(metric)]
    if missing:
        raise UsageError(missing)
    return metric


def choose_mode(runs: Sequence[Run], metric: str, mode: Mode | None) -> Mode:
    """Return whether lower or higher is better: as asked for, as the name says, or as the runs were told.

    Raises:
        UsageError: nobody says.
    """
    if mode is not None:
        return mode
    word = metric.split("/")[1] if "/" in metric else metric
    if lower_is_better(metric):
        return "min"
    if HIGHER.fullmatch(word):
        return "max"
    told: set[Mode] = {run.config.get("best_mode", "?") for run in runs if run.config.get("best_metric") == metric}
    if len(told & {"min", "max"}) != 1 or len(told) > 1:
        raise UsageError(f"--metric {metric}: say with --mode min or --mode max whether lower or higher is better")
    return told.pop()


def measure(runs: Sequence[Run], metric: str, mode: Mode) -> tuple[list[Measured], int | None]:
    """Return the values of the metric, and the largest step at which all runs have one; None: there is none."""
    curves = [run.curve(metric) for run in runs]
    shared = set.intersection(*({step for step, _ in curve} for curve in curves))
    step = max(shared, default=None)
    choose = max if mode == "max" else min
    measured = []
    for run, curve in zip(runs, curves):
        numbers = [point for point in curve if not math.isnan(point[1])]
        best = choose(numbers, key=lambda point: point[1]) if numbers else None  # of equals the first
        measured.append(Measured(run, curve, best, curve[-1], None if step is None else dict(curve)[step]))
    return measured, step


def step_to_compare(runs: Sequence[Run], equal_step: int | None) -> int | None:
    """Return the step that all have if it is the same amount of training for all; None: compare the last values."""
    return None if SAMPLES_OF_A_STEP & differing_settings(runs).keys() else equal_step


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with the value of each run; names of runs are left out."""
    names = sorted({name for run in runs for name in run.config} - {"run_name", "output_dir", "config"})
    table = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: values for name, values in table.items() if len({as_key(value) for value in values}) > 1}


def differing_facts(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Return commits, versions and such that are not the same in all runs that tell them."""
    names = dict.fromkeys(name for run in runs for name in run.facts)
    table = {name: [run.facts.get(name) for run in runs] for name in names}
    return {name: values for name, values in table.items() if len(set(values) - {None}) > 1}


def as_key(value: Any) -> str:
    """Return a text that is equal for equal settings; W&B writes 1.0 as 1 and tuples as lists."""
    return json.dumps(value, sort_keys=True, default=str) if not _is_whole(value) else str(int(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def form_groups(measured: Sequence[Measured], mode: Mode, step: int | None) -> tuple[list[Group], list[str]]:
    """Return the groups, the best mean first, and notes on runs that are copies or have no number.

    Args:
        measured: all runs.
        mode: which values are better.
        step: the one that all have, whose values are compared; None: the last values are.
    """
    runs = [one.run for one in measured]
    differing = sorted(differing_settings(runs).keys() - HARMLESS - {"seed"})
    members: dict[str, list[Measured]] = {}
    notes = []
    for one in measured:
        label = describe({name: one.run.config.get(name) for name in differing}) or "all runs"
        group = members.setdefault(label, [])
        original = next((other.run.name for other in group if is_copy(one.run, other.run)), None)
        if original is None:
            group.append(one)
        else:
            notes.append(f"{one.run.name}: the run {original} once more, by settings and seed; left out of its group")
    groups = []
    for label, group in members.items():
        values = {one.run.name: one.last[1] if step is None else one.at_equal for one in group}
        finite = [value for value in values.values() if value is not None and math.isfinite(value)]
        groups.append(Group(label, group, finite))
        bad = [name for name, value in values.items() if value not in finite]
        notes += [f"{name}: has no finite value where runs are compared; left out of its group" for name in bad]
    sign = 1 if mode == "min" else -1
    return sorted(groups, key=lambda group: (math.isnan(group.mean), sign * group.mean)), notes


def is_copy(one: Run, other: Run) -> bool:
    """Say whether two runs of the same settings must give the same numbers: seed and code are the same.

    A run without a seed is none; a commit that nobody knows is not another one.
    """
    commits = {run.facts["commit"] for run in (one, other) if "commit" in run.facts}
    return one.seed is not None and one.seed == other.seed and len(commits) < 2


def describe(settings: dict[str, Any]) -> str:
    """Return settings as "name=value, name=value"."""
    return ", ".join(f"{name}={show_setting(value)}" for name, value in settings.items())


def show_setting(value: Any) -> str:
    """Return the value of a setting as a person writes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def find_differences(groups: Sequence[Group]) -> list[Difference]:
    """Compare the best group, which is the first, with each of the others."""
    groups = [group for group in groups if group.values]
    return [
        Difference(best, other, abs(best.mean - other.mean), welch_interval(best.values, other.values))
        for best in groups[:1]
        for other in groups[1:]
    ]


def welch_interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % Welch interval of the absolute difference of the means; None if it cannot be had."""
    from scipy import stats

    if min(len(one), len(other)) < 2 or len(set(one)) == len(set(other)) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the same values on one side
        low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return (float(low), float(high)) if mean(one) >= mean(other) else (-float(high), -float(low))
