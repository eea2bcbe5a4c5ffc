"""--profile: where the time of a few steps goes, on rank 0, as a trace and as a table; the run goes on as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from train.engine.run_directory import RunDirectory
from train.engine.runtime import Runtime
from train.engine.settings import TrainSettings

# The first steps find buckets, memory and the fastest kernels; the profiler's own start takes a part of the fourth.
SKIPPED, WARM_UP, PROFILED = 3, 1, 4
MOST_LINES = 10


@contextmanager
def profile_steps(settings: TrainSettings, runtime: Runtime, run: RunDirectory | None) -> Iterator[Callable[[], None]]:
    """Give what is to be called after each step; it profiles some of them, if that is wanted."""
    if not settings.profile or run is None or not runtime.is_main:
        yield lambda: None
        return
    reported: list[Path] = []
    activities = [ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(
        activities=activities,
        schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=PROFILED, repeat=1),
        on_trace_ready=partial(_report, runtime, run.path / "profile" / "trace.json.gz", reported),
        acc_events=True,  # torch 2.13 warns without it
    )

    def after_step() -> None:
        if not reported:
            profiler.step()

    with profiler:
        yield after_step
    if not reported:
        runtime.say(f"--profile: this start took fewer than {SKIPPED + WARM_UP + 1} steps; nothing was profiled")


def _report(runtime: Runtime, path: Path, reported: list[Path], profiler: profile) -> None:
    reported.append(path)
    try:
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except OSError as error:  # the run needs no trace
        runtime.say(f"--profile: {path} cannot be written ({error.strerror or error})")
    else:
        runtime.say(f"profile: {path}, for chrome://tracing or ui.perfetto.dev")
    for line in _dearest_operations(profiler, runtime.device):
        runtime.say(line)


def _dearest_operations(profiler: profile, device: torch.device) -> list[str]:
    """Return a table of the operations that took most of the time themselves, on the device, dearest first."""
    on_cpu = device.type == "cpu"
    averages = profiler.key_averages()
    steps = max(1, sum(event.count for event in averages if event.key.startswith("ProfilerStep")))
    times = {
        event: event.self_cpu_time_total if on_cpu else event.self_device_time_total
        for event in averages
        if not event.key.startswith("ProfilerStep")
    }
    total = sum(times.values()) or 1
    dearest = sorted(times, key=lambda event: -times[event])[:MOST_LINES]
    return ["  share   ms a step   calls a step   operation"] + [
        f"{times[event] / total:7.1%}{times[event] / 1000 / steps:12.3f}{event.count / steps:15.1f}   {event.key[:80]}"
        for event in dearest
    ]
