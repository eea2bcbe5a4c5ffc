"""Signals to a flag that all processes agree on, at little cost.

Ctrl-C, SIGTERM and SIGUSR1 only set a flag, and so does the file that EXACT_TRAINING_STOP_FILE names as soon as it is
there. A maximum over all processes is started now and then and read one step later, when it has long arrived: so all
processes act at the same step. How many steps lie between two of them is in the maximum too, so that all know it.
"""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from train.engine.signals import SIGNALS

# With gloo a maximum takes 0.4 ms of a core in each process: an eighth of a small network's step, 0.4 % when it is done
# so often. A person or a cluster does not notice the delay. Should steps become slow all at once, it is MOST_STEPS.
SECONDS_BETWEEN = 0.1
MOST_STEPS = 32


class Request(IntEnum):
    """What a process asks all others to do at the next step; the highest wins."""

    NOTHING = 0
    SAVE = 1  # minutes since the last checkpoint have passed
    STOP = 2  # save and leave
    ABORT = 3  # leave without saving: rank 0 cannot write


class Preemption:
    """Catches stop signals while it is entered; the handlers before come back at exit."""

    def __init__(self, control: dist.ProcessGroup | None) -> None:
        self.signal_name: str | None = None
        self.wish = Request.NOTHING  # of this process
        self._received = 0.0
        self._control = control
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._left = 0  # steps without a maximum that are to come; the same number on all processes
        self._steps = 0  # since the latest maximum was started, at this time
        self._started = time.monotonic()
        leads = control is None or dist.get_rank() == 0  # the file may be on this machine only
        self._stop_file = os.environ.get("EXACT_TRAINING_STOP_FILE") if leads else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # Who signals a second time does not wait. Within a second it is the same signal, from the terminal and from
        # torchrun; and SIGTERM after SIGUSR1 or the file is a time limit that was warned of, with some seconds to save.
        warned = number == signal.SIGTERM and self.signal_name not in (None, "SIGTERM", "SIGINT")
        if self.signal_name is not None and not warned and now - self._received > 1.0:
            raise KeyboardInterrupt
        self._received = now
        self.signal_name = signal.Signals(number).name
        self.wish = Request.STOP

    def agree(self, *, at_once: bool = False) -> Request:
        """Return what the processes agreed on; to be called once a step by all of them, in the same way.

        With several processes the answer is one call old, so that nobody waits for it, and fast steps take turns.

        Args:
            at_once: exchange at this call, however short the time since the latest exchange is, and at the next one:
                such calls are batches of an evaluation, whose time says nothing of how long a step takes.
        """
        if self._control is None:
            return self._take()
        agreed = Request.NOTHING
        if self._pending is not None:
            work, value = self._pending
            self._pending = None
            work.wait()
            wish, negative_steps = value.tolist()
            agreed, self._left = Request(wish), -negative_steps - 1
            if agreed is self.wish is Request.SAVE:  # asked for again while the processes agreed
                self.wish = Request.NOTHING
        elif self._left > 0:
            self._left -= 1
        self._steps += 1
        if self._left == 0 or at_once:
            now = time.monotonic()
            steps = int(SECONDS_BETWEEN * self._steps / max(now - self._started, 1e-9))
            self._steps, self._started = 0, now
            self._start(1 if at_once else max(1, min(MOST_STEPS, steps)))
        return agreed

    def _start(self, steps: int) -> None:
        """Start the maximum of what the processes wish, and of when the next is due: the fewest steps win."""
        value = torch.tensor([int(self._take()), -steps])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._pending = (work, value)

    def settle(self) -> None:
        """Finish the reduction under way, before the process group is used for other things or closed."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _take(self) -> Request:
        if self._stop_file is not None and self.signal_name is None and os.path.exists(self._stop_file):
            self.signal_name, self.wish = f"the file {self._stop_file}", Request.STOP
        wish = self.wish
        if wish is Request.SAVE:
            self.wish = Request.NOTHING
        return wish
