"""How the launchers of several machines meet, each time that they start workers, and leave.

torchrun's static rendezvous meets once (torch 2.13): a machine starts crashed workers again although the others do not
know of the crash yet, and gloo finds addresses of dead processes in a store that is still the same. So restarts are
used up in vain. Here a start begins when all machines are there, with an empty store.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

BACKEND = "static-each-start"
WAITING_SECONDS = 2400  # torchrun has 600; other workers may notice a loss after --collective_timeout_seconds, 1800
LEAVING_SECONDS = 10  # torchrun has 300; the workers leave together, so it is only long when some did not end well
Value = TypeVar("Value")
_run = LocalElasticAgent.run


class _OtherCountError(Exception):
    """Another machine waits for another number of machines."""


class Meeting(StaticTCPRendezvous):
    """A static rendezvous that takes place at every start of the workers."""

    _starts = 0
    _awaited = 0  # number of a machine

    def get_backend(self) -> str:
        """Return the name of this kind of rendezvous."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all machines.

        Raises:
            RendezvousError: one did not come, or was told of another number of machines; the message says which.
        """
        try:
            return _within(self.timeout.total_seconds(), self._meet)
        except _OtherCountError as error:
            raise RendezvousError(
                f"machine {self._awaited} was started for {error} machines, and {socket.gethostname()} for "
                f"{self.world_size}: give all the same --nnodes"
            ) from error
        except (TimeoutError, RuntimeError) as error:  # what a store raises is a RuntimeError
            if "EADDRINUSE" in str(error):
                raise RendezvousError(
                    f"port {self.master_port} of {socket.gethostname()} is taken: choose another --master-port, and "
                    "see that only the first machine has --node-rank 0"
                ) from error
            raise RendezvousTimeoutError(
                f"{socket.gethostname()} waited in vain for machine {self._awaited} of 0 to {self.world_size - 1}, "
                f"meeting at {self.master_addr} port {self.master_port} (--rdzv-conf timeout="
                f"{self.timeout.total_seconds():.0f}). Checkpoints are intact: run the command again on all machines. "
                f"({str(error).splitlines()[0] if str(error) else 'no answer'})"
            ) from error

    def _meet(self) -> RendezvousInfo:
        self._starts += 1
        self._awaited = 0
        host = self.rank == 0
        if self._store is None:
            self._store = TCPStore(
                self.master_addr, self.master_port, None, host, self.timeout, wait_for_workers=False, multi_tenant=True
            )
        store = PrefixStore(f"{self.run_id}-{self._starts}", self._store)
        for number in _say_and_await("come", self.rank, self.world_size, store, self.timeout.total_seconds()):
            self._awaited = number
        if host:  # in this process, so that the others learn who is lost even if rank 0 is
            self._of_workers = TCPStore(self.master_addr, 0, None, True, self.timeout, wait_for_workers=False)
        port = self._of_workers.port if host else None
        place = RendezvousStoreInfo.build(self.rank, store, self.master_addr, port)
        return RendezvousInfo(store, self.rank, self.world_size, place)


def meet_at_each_start(options: argparse.Namespace) -> None:
    """Change torchrun's options from its static rendezvous to this one, and how launchers wait at the end.

    Raises:
        ValueError: an option has a value that cannot be; says which.
    """
    SimpleElasticAgent._exit_barrier = _leave_together  # type: ignore[method-assign]
    LocalElasticAgent.run = _run_and_leave_together  # type: ignore[method-assign]
    alone = options.nnodes in ("1", "1:1") and options.master_port is None and not options.rdzv_endpoint
    if options.rdzv_backend != "static" or options.standalone or alone:
        return
    machines = int(options.nnodes.partition(":")[2] or options.nnodes)
    if not 0 <= options.node_rank < machines:
        raise ValueError(f"--node-rank {options.node_rank}: machines are numbered 0 to {machines - 1}")
    if not 0 < (options.master_port or 29500) < 65536:
        raise ValueError(f"--master-port {options.master_port}: ports are numbered 1 to 65535")
    options.rdzv_endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port or 29500}"
    options.rdzv_conf = ",".join(filter(None, [options.rdzv_conf, f"rank={options.node_rank}"]))
    options.rdzv_backend, options.node_rank = BACKEND, 0
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> Meeting:
    address, port = parse_rendezvous_endpoint(parameters.endpoint, 29500)
    rank, seconds = int(parameters.config["rank"]), parameters.get_as_int("timeout", WAITING_SECONDS) or 0
    return Meeting(address, port, rank, parameters.max_nodes, parameters.run_id, seconds)


def _run_and_leave_together(agent: LocalElasticAgent, *arguments: Any) -> Any:
    """Run a launcher. One that got a signal tells the others when its workers have ended, too.

    In torch 2.13 it does not. Whoever is started again meanwhile meets the addresses of dead workers.
    """
    try:
        return _run(agent, *arguments)
    except SignalException:
        if agent._pcontext is not None:  # there were workers, so all launchers had met
            _leave_together(agent)
        raise


def _leave_together(agent: SimpleElasticAgent) -> None:
    """Wait a moment for the other launchers where their store is; without it they would print a trace."""
    group: Any = agent._worker_group
    others = _say_and_await("leave", group.group_rank, group.group_world_size, group.store, LEAVING_SECONDS)
    with contextlib.suppress(RuntimeError, TimeoutError):  # they are gone
        _within(LEAVING_SECONDS, lambda: list(others) if group.group_rank == 0 else next(others))


def _say_and_await(word: str, rank: int, size: int, store: Store, seconds: float) -> Iterator[int]:
    """Leave a word and give the number of each machine before waiting for its word.

    Raises:
        TimeoutError: after that time one is missing.
        _OtherCountError: one waits for another number of machines.
    """
    end = time.monotonic() + seconds
    store.set(f"{word}-{rank}", str(size))
    for number in range(size):
        yield number
        while not store.check([f"{word}-{number}"]):
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.1)
        other = store.get(f"{word}-{number}").decode()
        if other != str(size):
            raise _OtherCountError(other)


def _within(seconds: float, work: Callable[[], Value]) -> Value:
    """Return what `work` does, which may wait for a machine that does not answer for as long as TCP tries.

    Raises:
        TimeoutError: it takes longer.
        RuntimeError: the store is gone.
        _OtherCountError: as `work` raises it.
    """
    outcome: list[Value] = []
    errors: list[Exception] = []

    def try_work() -> None:
        try:
            outcome.append(work())
        except (RuntimeError, TimeoutError, _OtherCountError) as error:
            errors.append(error)

    thread = threading.Thread(target=try_work, daemon=True)
    thread.start()
    thread.join(seconds + 1)  # the limits of `work` come first
    if errors:
        raise errors[0]
    if not outcome:
        raise TimeoutError
    return outcome[0]
