"""From a run that is ready to its exit code: examine it, train it, finish it."""

from __future__ import annotations

from train.engine.checks.subject import Subject
from train.engine.contract import Score
from train.engine.errors import EXIT_DONE, EXIT_STOPPED
from train.engine.loop import Loop
from train.engine.preemption import Request
from train.engine.preflight import preflight, warn
from train.engine.session import finish
from train.engine.tracking import Tracker


def carry_out(subject: Subject, tracker: Tracker, test: Score | None) -> int:
    """Train a run, or only examine it, as its settings ask, and return the exit code.

    Args:
        subject: the run.
        tracker: takes its metrics.
        test: scores the test split, if there is one.

    Raises:
        TrainingError: training cannot go on; the checkpoints before are intact.
    """
    settings, runtime, session, state = subject.settings, subject.runtime, subject.session, subject.state
    if settings.only_preflight:
        code = preflight(subject)
        runtime.close()
        return code
    if settings.preflight != "off":
        warn(subject)
    loop = Loop(
        settings, runtime, session, state, subject.loader, subject.measure, subject.evaluate, tracker, subject.data
    )
    with loop.heartbeat.explain_loss():
        request = loop.train()
        finish(runtime, session, state, tracker, test, settings.best_metric)
    if request is Request.STOP:
        runtime.say(f"saved at step {state.progress.step}; run the same command again to go on")
    runtime.close()
    if request is Request.STOP:
        return EXIT_STOPPED
    return EXIT_DONE
