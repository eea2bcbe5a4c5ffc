"""Which learning rates the run could use: a range test with its own loop and optimizer.

Source: L. N. Smith, Cyclical Learning Rates for Training Neural Networks (2015), section 3.3. The rate rises
exponentially from step to step; the loss falls where the rate is useful, and rises where it is too high.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.engine.checks.finding import Finding, judge, number
from train.engine.checks.probe import coming_batches, probe_loop, take_step
from train.engine.checks.subject import Subject, trial

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.8  # of the loss; a higher one finds a later minimum
DIVERGED = 4.0  # times the smallest smoothed loss
FALL = 0.95  # of the loss at the start, below which something was learnt
BELOW_SUGGESTION = 30.0  # times, down to which a rate is only slow


@dataclass(frozen=True)
class Curve:
    """What the range test saw."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]

    @property
    def lowest(self) -> int:
        """Where the smoothed loss is lowest, and begins to rise."""
        return min(range(len(self.smooth)), key=self.smooth.__getitem__)

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest over the logarithm of the rate."""
        falls = [
            self.smooth[k + 1] - self.smooth[k - 1] for k in range(1, max(2, self.lowest)) if k + 1 < len(self.smooth)
        ]
        return self.rates[1 + falls.index(min(falls))] if falls else self.rates[0]

    @property
    def suggestion(self) -> float:
        """A tenth of the rate at which the loss is lowest."""
        return self.rates[self.lowest] / 10


def check_learning_rate(subject: Subject) -> Iterator[Finding]:
    """Raise the learning rate from step to step, and say where the run's own lies on the curve of the loss."""
    with trial(subject):
        curve = _range_test(subject)
    own = subject.settings.learning_rate
    run = subject.session.run
    if run is not None and subject.runtime.is_main and curve.rates:
        _draw(curve, own, run.plots / "learning_rate.png")
    yield _judge(curve, own)


def _range_test(subject: Subject) -> Curve:
    """Take a step at each rate until the loss diverges; the same on all processes, which share the loss."""
    loop = probe_loop(subject, on_nonfinite="stop")
    first, own = loop.state.progress.step, loop.settings.learning_rate
    factor = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    loop.schedule = lambda step: LOWEST * factor ** (step - first) / own
    batches = coming_batches(loop)
    curve = Curve([], [], [])
    average = 0.0
    for _ in range(STEPS):
        rate = own * loop.schedule(loop.state.progress.step)
        loss = take_step(loop, next(batches)).loss
        if not math.isfinite(loss):
            if loop.state.scaler is not None and not curve.rates:  # fp16 looks for its scale first
                continue
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        curve.rates.append(rate)
        curve.losses.append(loss)
        curve.smooth.append(average / (1 - SMOOTHING ** len(curve.rates)))
        if curve.smooth[-1] > DIVERGED * min(curve.smooth):
            break
    return curve


def _judge(curve: Curve, own: float) -> Finding:
    name = "learning rate"
    values: dict[str, Any] = {"rates": curve.rates, "losses": curve.losses, "smooth": curve.smooth}
    if not curve.rates or curve.smooth[curve.lowest] > FALL * curve.smooth[0]:
        return judge(
            name,
            False,
            f"the loss does not fall at any rate from {LOWEST:.0e} to {HIGHEST:.0e}",
            f"it falls below {FALL:.0%} of its start",
            (
                "nothing is learnt at all: see what --preflight says of gradients, labels and the loss",
                "the loss of single batches varies more than it falls: try a larger --batch_size",
            ),
            otherwise="warn",
            **values,
        )
    rising = curve.rates[curve.lowest]
    slowest = min(curve.suggestion, curve.steepest) / BELOW_SUGGESTION
    where = "" if slowest <= own <= rising else ", too low" if own < slowest else ", too high"
    return judge(
        name,
        slowest <= own <= rising,
        f"{number(own)} is yours{where}; the loss falls fastest at {number(curve.steepest)} and rises from "
        f"{number(rising)} on, a tenth of which is {number(curve.suggestion)}",
        f"{number(slowest)} to {number(rising)}",
        (
            f"set --learning_rate {curve.suggestion:.1g}, or up to {curve.steepest:.1g} with warm-up"
            if curve.steepest > curve.suggestion
            else f"set --learning_rate {curve.suggestion:.1g}",
        ),
        otherwise="warn",
        suggestion=curve.suggestion,
        steepest=curve.steepest,
        rising=rising,
        **values,
    )


def _draw(curve: Curve, own: float, target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, ".", alpha=0.3, color="tab:blue", label="loss")
    axes.plot(curve.rates, curve.smooth, color="tab:blue", label="smoothed")
    axes.axvline(own, color="black", linestyle="--", label=f"this run: {number(own)}")
    axes.axvline(curve.suggestion, color="tab:green", label=f"suggested: {number(curve.suggestion)}")
    axes.axvline(curve.steepest, color="tab:orange", linestyle=":", label=f"falls fastest: {number(curve.steepest)}")
    axes.set_xscale("log")
    axes.set_ylim(0.9 * min(curve.losses), 1.5 * max(curve.smooth[: curve.lowest + 1]))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)
