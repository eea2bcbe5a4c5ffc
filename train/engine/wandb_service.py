"""What has to be done around the package wandb (0.31): its variables, and the process of its own at the end."""

from __future__ import annotations

import atexit
import os
import signal
import sys

import psutil

NAME = "wandb-core"
EXIT_SECONDS = 12  # with what W&B gets to finish a run, less than 30


def drop_empty_variables() -> None:
    """Let empty variables of W&B count as not set; it refuses them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        if not os.environ[name].strip():
            del os.environ[name]


def limit_exit(code: int) -> None:
    """Let this process leave with `code` if its exit, which is to follow, takes long; do nothing without W&B.

    W&B talks through a process of its own, for which Python waits without end at its exit. In CI it hung once, with all
    work done.
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
