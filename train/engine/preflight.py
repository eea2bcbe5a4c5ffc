"""Preflight: find the bug before the cluster hours are spent.

--preflight examines a run that is ready to start, on its exact configuration, and leaves with 0 or 3. A quick part of
it looks at every fresh start and warns. Neither changes the run that follows: weights, optimizer, generators and data
position are as if it had not looked.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from train.engine.checks.batches import check_augmentation, check_batches
from train.engine.checks.disk import check_disk, check_folder
from train.engine.checks.evaluation import check_evaluation, check_evaluation_data
from train.engine.checks.finding import Finding, skip
from train.engine.checks.gradients import check_gradients, check_optimizer, check_samples_apart
from train.engine.checks.inputs import check_features, check_inputs
from train.engine.checks.labels import check_labels
from train.engine.checks.learning import check_learning, check_overfit
from train.engine.checks.outputs import check_initial_loss, check_outputs
from train.engine.checks.overlap import check_overlap
from train.engine.checks.processes import check_processes
from train.engine.checks.rate import check_learning_rate
from train.engine.checks.report import Report, write_report
from train.engine.checks.round_trip import check_round_trip
from train.engine.checks.speed import check_speed
from train.engine.checks.step import check_step
from train.engine.checks.subject import Subject, without_trace
from train.engine.errors import EXIT_DONE, EXIT_PREFLIGHT, TrainingError, UsageError

Check = Callable[[Subject], Iterable[Finding]]

MACHINE: tuple[Check, ...] = (check_processes, check_folder, check_disk)
# None of these changes a weight, and all of them together take a few seconds at most.
QUICK: tuple[Check, ...] = (
    *MACHINE,
    check_inputs,
    check_features,
    check_labels,
    check_overlap,
    check_batches,
    check_augmentation,
    check_outputs,
    check_initial_loss,
    check_gradients,
    check_optimizer,
    check_samples_apart,
    check_evaluation,
)
FULL: tuple[Check, ...] = (
    *QUICK,
    check_evaluation_data,
    check_overfit,
    check_learning,
    check_step,
    check_round_trip,
    check_speed,
)


def examine(subject: Subject, checks: Iterable[Check]) -> Report:
    """Carry the checks out, in order; all processes together.

    A check that breaks off with an error is a finding, too.
    """
    start = time.perf_counter()
    findings: list[Finding] = []
    for check in checks:
        began = time.perf_counter()
        with without_trace(subject):
            new = _carry_out(check, subject, {finding.measured for finding in findings})
        seconds = (time.perf_counter() - began) / max(len(new), 1)
        findings += [replace(finding, seconds=round(seconds, 3)) for finding in new]
        if any(finding.stop for finding in new):
            break
    start_of_run = {
        "command": shlex.join(sys.argv),
        "run": subject.settings.run_name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processes": subject.runtime.num_processes,
        "device": str(subject.runtime.device),
        "torch": torch.__version__,
        "settings": asdict(subject.settings),
    }
    return Report(subject.settings.preflight, tuple(findings), time.perf_counter() - start, start_of_run)


def _carry_out(check: Check, subject: Subject, known: set[str]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(subject))
    except UsageError:  # already says what to do, and stops the run anyway
        raise
    except Exception as error:  # any defect of a model or a loss may come out here: finding it is what this is for
        name = check.__name__.removeprefix("check_").replace("_", " ")
        message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        text = f"{type(error).__name__}: {message} ({_place(error)})"
        if text in known:  # one defect, one alarm
            return [*found, skip(name, f"{type(error).__name__}, as above")]
        cause = "training would break off with the same error: mend it first"
        if "does not require grad" in message:
            cause = "the graph is cut between the model and the loss: look for .detach(), .item() or torch.no_grad()"
        found.append(Finding(name, "fail", text, "no error", (cause,)))
    return found


def _place(error: Exception) -> str:
    """Return file and line of the innermost code that is no library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{os.path.relpath(own[-1].filename)}:{own[-1].lineno}"


def warn(subject: Subject) -> None:
    """Carry out the quick checks before a run and say what is not as expected; never stops the run.

    A run that goes on from a checkpoint is no longer untrained: of it, only the machine is looked at. So it is with
    DeepSpeed, which takes every gradient for one of training.
    """
    resumed = subject.session.found is not None
    report = examine(subject, MACHINE if resumed or subject.state.zero is not None else QUICK)
    if subject.runtime.is_main:
        print(report.summary(), flush=True)
        if subject.session.run is not None and not resumed:
            try:
                write_report(report, subject.session.run.path)
            except OSError as error:  # the run needs no report; if it cannot write either, its own saves say so
                print(f"preflight.md cannot be written: {error.strerror or error}", flush=True)


def preflight(subject: Subject) -> int:
    """Carry out what --preflight asks for, print and write the report, and return the exit code.

    Raises:
        UsageError: training is with DeepSpeed.
        TrainingError: the report cannot be written.
    """
    if subject.state.zero is not None:
        raise UsageError("--preflight: DeepSpeed takes every gradient for one of training; examine on plain processes")
    checks = (check_learning_rate,) if subject.settings.preflight == "lr" else FULL
    report = examine(subject, checks)
    subject.runtime.say(report.table())
    run = subject.session.run
    written = [] if run is None else subject.runtime.on_main(lambda: _write(report, run.path))
    for path in written:
        subject.runtime.say(f"written {path}")
    failed = subject.runtime.broadcast(report.failed)
    return EXIT_PREFLIGHT if failed else EXIT_DONE


def _write(report: Report, run: Path) -> list[Path]:
    try:
        return write_report(report, run)
    except OSError as error:
        raise TrainingError(f"{error.filename or run}: cannot be written ({error.strerror or error})") from error
