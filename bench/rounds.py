"""Measuring several ways in turn, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")
POLL_SECONDS = 0.002


def measure_rounds(ways: Mapping[str, Callable[[], Value]], rounds: int) -> dict[str, list[Value]]:
    """Return what each way gave in each round; a first round, which warms up caches, is dropped."""
    seen: dict[str, list[Value]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in random.Random(number).sample(list(ways), len(ways)):
            value = ways[way]()
            if number:
                seen[way].append(value)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return seen


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Return the median of the ratios of the rounds."""
    return f"{statistics.median(one / other for one, other in zip(above, below)):.2f}"


def time_process(
    command: Sequence[str], environment: Mapping[str, str], done: Callable[[], bool] | None = None
) -> tuple[float, float]:
    """Start a process, wait until `done` says so and kill it; without `done`, wait for its end.

    Returns:
        Seconds on the clock, and of CPU time of the process and its children.

    Raises:
        RuntimeError: it failed, or ended before `done`; says what it printed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        if done is None:
            met = process.wait() == 0
        else:
            while not (met := done()) and process.poll() is None:
                time.sleep(POLL_SECONDS)
            met = met or done()
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        if not met:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {output.read()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
