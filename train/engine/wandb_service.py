"""The process of its own through which W&B talks, and for which Python waits at its exit (wandb 0.31)."""

from __future__ import annotations

import os
import sys
import threading
import time

import psutil

NAME = "wandb-core"
EXIT_SECONDS = 12  # with what W&B gets to finish a run, less than 30


def limit_exit(code: int) -> None:
    """Leave with `code` if the exit of this process, which is to follow, takes long; do nothing without W&B.

    W&B waits without end for its process, which hung in about one of a hundred exits measured, all work done.
    """
    if "wandb" not in sys.modules:
        return

    def leave() -> None:
        time.sleep(EXIT_SECONDS)
        for child in psutil.Process().children():
            if child.name() == NAME:
                child.kill()  # it would hold our output open
        sys.stdout.flush()
        os._exit(code)

    threading.Thread(target=leave, daemon=True).start()
