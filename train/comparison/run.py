"""What a comparison knows of a run, whichever place it was read from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any

from train.engine.settings import TrainSettings

# What cannot change the numbers of a run. How long it trains can; `neutral` has that as neutral because a run may be
# made longer. `engine` is another way to the same arithmetic.
HARMLESS = (TrainSettings.neutral | {"engine"}) - {"num_train_epochs", "max_train_steps"}


@dataclass
class Run:
    """Settings, metrics and circumstances of a run."""

    name: str
    source: str  # as it was asked for
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl, by step; "time" in seconds
    id: str | None = None  # in W&B
    place: str | None = None  # the folder of the run; two folders are two runs, though one may be a copy with its id
    starts: list[float] = field(default_factory=list)  # when each began, in seconds
    starts_known: bool = True  # otherwise there is but the time when the run was made, and restarts are not told
    facts: dict[str, str] = field(default_factory=dict)  # commit, versions and such, as text
    notes: list[str] = field(default_factory=list)  # what is wrong with the source

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def metrics(self) -> list[str]:
        """Names of what evaluation measured."""
        return sorted({name for line in self.lines for name in line if name.startswith("val/")})

    @property
    def steps(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def test(self) -> dict[str, float]:
        """Results on the test split; empty if there are none."""
        return {
            name: number
            for line in self.lines
            for name, value in line.items()
            if name.startswith("test/") and (number := as_number(value)) is not None
        }

    @property
    def samples_per_second(self) -> float | None:
        """Median over the lines of metrics."""
        speeds = [speed for _, speed in self.curve("perf/samples_per_second") if math.isfinite(speed)]
        return median(speeds) if speeds else None

    @property
    def seconds(self) -> float | None:
        """How long the steps took that the run kept: from each start to its last line of metrics, added up.

        Neither the time between starts counts nor steps that a kill undid. Where starts are not known, all the time
        since the run was made.
        """
        times = [
            line["time"] for line in self.lines if "time" in line and any(name.startswith("train/") for name in line)
        ]
        if not times or not self.starts:
            return None
        total = 0.0
        for begin, end in zip(self.starts, [*self.starts[1:], math.inf]):
            total += max((time - begin for time in times if begin <= time < end), default=0.0)
        return total

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric, by step; values may be NaN."""
        points = {line["step"]: number for line in self.lines if (number := as_number(line.get(metric))) is not None}
        return sorted(points.items())


def as_number(value: Any) -> float | None:
    """Return a value of a metric; W&B writes NaN and infinity as text."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def parse_time(text: str) -> float:
    """Return the seconds since 1970 of a time in ISO 8601, in UTC unless it says otherwise.

    Raises:
        ValueError: it is no such time.
    """
    zone = re.search(r"[+-]\d\d:?\d\d$", text[19:])
    return datetime.strptime(text[:19] + (zone[0] if zone else "+0000"), "%Y-%m-%dT%H:%M:%S%z").timestamp()
