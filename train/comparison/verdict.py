"""What the numbers say and do not say, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.comparison.analysis import SAMPLES_OF_A_STEP, Difference, Group, differing_facts, differing_settings
from train.comparison.run import Run

# Settings that choose the samples; where checkpoints tell the fingerprint of the data, that decides instead.
DATA = ("dataset", "dataset_config", "revision", "train_split", "validation_split", "validation_fraction", "data")
LOSS = ("mse_weight", "ssim_weight", "multi_scale", "kl_weight")  # settings that change what the loss of evaluation is


def show_number(value: float | None) -> str:
    """Return a number in five digits, a dash for none."""
    return "-" if value is None else f"{value:.5g}"


def pass_verdict(groups: Sequence[Group], differences: Sequence[Difference], what: str) -> list[str]:
    """Return a line for each comparison with the best group, and a caution where there are several.

    Args:
        groups: the best first.
        differences: of the best from the others.
        what: the metric and its step, as a reader should see it.
    """
    lines = [_judge(difference, what) for difference in differences]
    if len(lines) > 1:
        lines.append(
            f"{len(lines)} comparisons at once: chance excludes 0 in one of them more often than in 5 of 100 cases, "
            "and the best of many looks better than it is. Repeat the best with seeds that had no part in its choice."
        )
    if lines:
        return lines
    (first, *_) = groups
    if len(first.values) > 1:
        spread = f"mean {show_number(first.mean)}, standard deviation {show_number(first.deviation)}"
        return [f"Nothing to compare: {len(first.values)} runs of the same settings. {what}: {spread}."]
    return ["Nothing to compare: there is at most one group of runs with numbers."]


def _judge(difference: Difference, what: str) -> str:
    better, worse = difference.better, difference.worse
    counts = [len(better.values), len(worse.values)]
    if difference.value == 0:
        head = f"{better.label} and {worse.label} are equal in {what}"
    else:
        head = f"{better.label} is better than {worse.label} by {show_number(difference.value)} in {what}"
    if difference.interval is not None:
        low, high = difference.interval
        head += f" (means of {counts[0]} and {counts[1]} runs, 95 % Welch interval {low:.4g} to {high:.4g}). "
        if low > 0 or high < 0:
            return head + "The interval excludes 0: the choice of seeds hardly explains the difference."
        return head + "The interval includes 0: the choice of seeds may explain the difference."
    if max(counts) == 1:
        return head + ". One run each says nothing about chance: repeat both with other seeds."
    if min(counts) == 1:
        return head + ". One run on one side says nothing about chance: repeat it with other seeds."
    return head + ". On either side all runs gave the same value, so there is no interval."


def warn(
    runs: Sequence[Run], groups: Sequence[Group], metric: str, step: int | None, equal_step: int | None
) -> list[str]:
    """Return what makes runs incomparable, and what is mixed within a group.

    Args:
        runs: all of them.
        groups: that they form.
        metric: that is compared.
        step: at which it is compared; None: at the last step of each.
        equal_step: the largest at which all have it, if there is one.
    """
    differing, facts = differing_settings(runs), differing_facts(runs)
    warnings = []
    choices = [name for name in DATA if name in differing]
    known = all("data" in run.facts for run in runs)
    if "data" in facts:
        warnings.append(
            "not comparable as it is: the data differ (fingerprint"
            + (f", {', '.join(choices)}" if choices else "")
            + "); the numbers can be compared only if evaluation saw the same samples"
        )
    elif choices and not known:
        warnings.append(f"not comparable as it is: the runs may be on different data ({', '.join(choices)} differ)")
    if "validation_data" in differing:
        warnings.append("not comparable: validation_data differs, so the runs were evaluated on different samples")
    if "best_metric" in differing:
        warnings.append(
            "not comparable as it is: the runs chose their best checkpoint and when to stop by different metrics "
            f"({', '.join(sorted(map(str, differing['best_metric'])))})"
        )
    parts = [name for name in LOSS if name in differing]
    if parts and metric.endswith("loss"):
        warnings.append(f"not comparable: {metric} is not the same quantity ({', '.join(parts)} differ)")
    later = [run.name for run in runs if step is not None and run.curve(metric)[-1][0] > step]
    if later:
        named = f"{', '.join(later[:5])}{' and others' if len(later) > 5 else ''}"
        warnings.append(f"compared at step {step}, the last that all have; later evaluations: {named}")
    elif step is None:
        unlike = ", ".join(sorted(SAMPLES_OF_A_STEP & differing.keys()))
        reason = "no step has an evaluation of all runs" if equal_step is None else f"{unlike} differs between the runs"
        warnings.append(f"{reason}: the last values are compared, whatever they took")
    for group in groups:
        for name, values in differing_facts([one.run for one in group.members]).items():
            mixed = ", ".join(dict.fromkeys(shorten_fact(value) for value in values if value is not None))
            warnings.append(f"{group.label}: its runs differ in {name} ({mixed})")
    for run in runs:
        bad = sum(not math.isfinite(value) for _, value in run.curve(metric))
        if bad:
            warnings.append(f"{run.name}: {bad} of {len(run.curve(metric))} values of {metric} are NaN or infinite")
    return warnings


def shorten_fact(text: str) -> str:
    """Return a commit or fingerprint in ten letters, with what follows; other facts as they are."""
    return " then ".join(
        part[:10] + ("+changes" if part.endswith("+changes") else "")
        if len(part.removesuffix("+changes")) >= 32 and part[:32].isalnum()
        else part
        for part in text.split(" then ")
    )
