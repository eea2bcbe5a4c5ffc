"""Runs scripts as real processes that start in a fraction of a second.

A server process imports torch and the scripts once and computes nothing; each rank of each run is forked from it. What
a rank does is what `python train/SCRIPT.py` or `torchrun` would do: the same environment, the same entry, a real exit
code, real signals.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.process.preload"])


@dataclass
class Finished:
    """What became of a run."""

    codes: list[int]  # exit code of each rank; -9 for SIGKILL
    output: str  # of all ranks

    @property
    def code(self) -> int:
        assert len(set(self.codes)) == 1, (self.codes, self.output)
        return self.codes[0]


class Fleet:
    """The ranks of one run."""

    def __init__(self, folder, script, arguments, processes=1, faults=(), environment=None, threads=1, pictures=False):
        """Start the ranks.

        Args:
            folder: where the output of the ranks is kept.
            script: "classify", a module of `train`.
            arguments: command line.
            processes: number of ranks; with more than one the environment is torchrun's.
            faults: names and arguments of functions in tests.process.faults, called in each rank before the script.
            environment: further variables; None removes one.
            threads: torch's threads in each rank.
            pictures: draw those of the data and of the end, which take a second.
        """
        if not pictures:
            faults = [("draw_nothing",), *faults]
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"output-{time.monotonic_ns()}.txt"
        variables = dict(environment or {})
        if processes > 1:
            variables |= {
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "ACCELERATE_USE_CPU": "true",
            }
        arguments = [str(argument) for argument in arguments]
        self.ranks = [
            CONTEXT.Process(
                target=_be_rank,
                args=(script, arguments, rank, processes, variables, str(self.log), tuple(faults), threads),
            )
            for rank in range(processes)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self, seconds=120) -> Finished:
        """Wait for all ranks. As torchrun does, end the others when one fails."""
        end = time.monotonic() + seconds
        while any(rank.is_alive() for rank in self.ranks):
            failed = any(rank.exitcode not in (None, 0) for rank in self.ranks)
            if failed or time.monotonic() > end:
                # A rank that left by itself gives the others a moment to leave the same way.
                grace = time.monotonic() + (5 if failed else 0)
                while any(rank.is_alive() for rank in self.ranks) and time.monotonic() < grace:
                    time.sleep(0.01)
                self.kill()
                break
            time.sleep(0.005)
        for rank in self.ranks:
            rank.join()
        output = self.log.read_text() if self.log.exists() else ""
        assert time.monotonic() < end + 10, f"the run did not end in {seconds} s:\n{output}"
        return Finished([rank.exitcode for rank in self.ranks], output)

    def signal(self, number, ranks=None) -> None:
        """Send a signal to some or all ranks."""
        for position, rank in enumerate(self.ranks):
            if rank.is_alive() and (ranks is None or position in ranks):
                os.kill(rank.pid, number)

    def kill(self) -> None:
        """SIGKILL all ranks."""
        self.signal(signal.SIGKILL)

    def wait_for(self, text, seconds=60) -> None:
        """Wait until the output holds a text."""
        end = time.monotonic() + seconds
        while text not in (self.log.read_text() if self.log.exists() else ""):
            assert time.monotonic() < end and any(rank.is_alive() for rank in self.ranks), self.wait(1)
            time.sleep(0.01)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _be_rank(script, arguments, rank, processes, variables, log, faults, threads):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(threads)
    for name, *values in faults:
        getattr(importlib.import_module("tests.process.faults"), name)(rank, *values)
    module = importlib.import_module(f"train.{script}")
    sys.argv = [str(Path(module.__file__)), *arguments]
    try:
        module.run()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
