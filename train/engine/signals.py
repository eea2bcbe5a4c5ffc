"""Signals that ask a run to stop, and what they do where there is nothing to save."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StoppedEarlyError(Exception):
    """A stop signal came when there was nothing to save: before training, or after it."""


def leave_on_signals() -> None:
    """Let SIGTERM and SIGUSR1 end this process by StoppedEarlyError, as Ctrl-C does by KeyboardInterrupt."""
    here = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:  # a forked child, which ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise StoppedEarlyError(signal.Signals(number).name)

    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, leave)
