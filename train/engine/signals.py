"""Signals that ask a run to stop, and what they do where there is nothing to save."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StoppedEarlyError(Exception):
    """A stop signal came when there was nothing to save: before training, or after it."""


def hear_of_launcher_death() -> None:
    """Ask Linux for SIGTERM when the launcher dies, if there is one.

    The single-process `accelerate launch` forwards no signal (accelerate 1.15), and no launcher forwards SIGKILL, which
    may come from a machine short of memory: without this, processes would go on unheard, and hold the run.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


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
