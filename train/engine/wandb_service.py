"""The process of its own through which W&B talks, and for which Python waits at its exit (wandb 0.31)."""

from __future__ import annotations

import atexit
import os
import signal
import sys

import psutil

NAME = "wandb-core"
EXIT_SECONDS = 12  # with what W&B gets to finish a run, less than 30


def limit_exit(code: int) -> None:
    """Let this process leave with `code` if its exit, which is to follow, takes long; do nothing without W&B.

    W&B waits without end for its process, which hung in about one of a hundred exits, with all work done.
    """
    if "wandb" not in sys.modules:
        return

    def leave(*_: object) -> None:
        for child in psutil.Process().children():
            if child.name() == NAME:
                child.kill()  # it would hold our output open
        sys.stdout.flush()
        os._exit(code)

    def begin() -> None:
        signal.signal(signal.SIGALRM, leave)
        signal.alarm(EXIT_SECONDS)

    atexit.register(begin)  # the last to be registered is the first to be called, so before W&B waits
