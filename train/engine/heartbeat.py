"""Who is missing when processes wait for each other in vain: each says now and then where it is."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from train.engine.errors import LostProcessError, is_of_exchange, see

EVERY_SECONDS = 5.0
ANSWER_SECONDS = 3.0
ALL_SECONDS = 1.0  # in which all that wait in vain say that they are there


class Heartbeat:
    """Leaves each process's step in the store of the process group, in less than a millisecond every few seconds."""

    def __init__(self) -> None:
        self._store = dist.PrefixStore("heartbeat", _get_default_store()) if dist.is_initialized() else None
        self._latest = 0.0
        self._step = 0

    def beat(self, step: int) -> None:
        """Say that this process has finished a step."""
        self._step = step
        now = time.monotonic()
        if self._store is None or now - self._latest < EVERY_SECONDS:
            return
        self._latest = now
        self._say_where(self._store)

    def _say_where(self, store: dist.Store) -> None:
        place = {"host": socket.gethostname(), "process": os.getpid(), "step": self._step, "time": time.time()}
        store.set(str(dist.get_rank()), json.dumps(place))

    def _describe_most_silent(self) -> str:
        """Return a line on the process that has been silent for longest; which is why the others wait."""
        store = self._store
        assert store is not None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        everyone = range(dist.get_world_size())
        try:
            # A store waits for a machine that does not answer as long as TCP does: 15 minutes. This has a limit.
            socket.create_connection(address, ANSWER_SECONDS).close()
            self._say_where(store)
            time.sleep(ALL_SECONDS)
            known = {rank: json.loads(store.get(str(rank))) for rank in everyone if store.check([str(rank)])}
        except (OSError, RuntimeError, ValueError) as error:  # the store lives with rank 0, or with its launcher
            return f"the machine of rank 0 ({address[0]}) does not answer ({error})".splitlines()[0]
        silent = sorted(set(everyone) - known.keys())
        if silent:
            return f"never heard of rank(s) {silent}"
        rank, last = min(known.items(), key=lambda item: item[1]["time"])
        return (
            f"silent for longest: rank {rank} on {last['host']} (process {last['process']}), heard of "
            f"{time.time() - last['time']:.0f} s ago at step {last['step']}"
        )

    @contextmanager
    def explain_loss(self) -> Iterator[None]:
        """Turn an error of the exchange between processes into a message on who is missing.

        Raises:
            LostProcessError: a process crashed, hangs or cannot be reached; the checkpoints are intact.
        """
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not is_of_exchange(error):
                raise
            raise LostProcessError(
                f"rank {dist.get_rank()} on {socket.gethostname()} waits for other processes in vain; "
                f"{self._describe_most_silent()}. Checkpoints are intact: run the same command again; "
                f"{see('a-process-hangs-or-is-lost')} ({str(error).split('. ')[0]})"
            ) from error
