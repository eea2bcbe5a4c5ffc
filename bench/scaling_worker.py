"""One process of bench/scaling.py: it times blocks of the run's own training steps and counts what it sends.

It reads a task, a line of JSON, from standard input, and rank 0 answers with a line of JSON. All processes of a group
get the same tasks in the same order.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from data_modules.splits import GlobalBatch, InputSpec, Slot
from train.classify import build_model
from train.engine.batching import Batching
from train.engine.loop import Loop
from train.engine.optimizer import build_optimizer
from train.engine.preemption import Preemption
from train.engine.randomness import seed_all
from train.engine.runtime import Runtime, start_runtime
from train.engine.session import Session, prepare_state
from train.engine.settings import TrainSettings
from train.engine.state import Progress, RunState
from train.engine.tracking import Tracker

CLASSES = 10
WORDS, TOKENS = 20_000, 64
INPUTS = {  # as the project's recipes have them
    "mlp": InputSpec("points", (64,)),
    "mnist_cnn": InputSpec("image", (1, 28, 28)),
    "simple_cnn": InputSpec("image", (3, 32, 32)),
    "fast_cnn": InputSpec("image", (1, 28, 28)),
    "simple_lstm": InputSpec("text", vocabulary_size=WORDS),
}
BYTES_SENT = 200  # where tcpi_bytes_sent lies in struct tcp_info (linux/tcp.h, since Linux 4.19)
WARM_UP, TRIED = 3, 3


@dataclass
class Samples:
    """A loader that has always the same batch; an epoch never ends."""

    batch_size: int
    num_samples: int = 2**62


@dataclass
class Subject:
    """A model with its loop, warmed up."""

    loop: Loop | Exchange
    batch: GlobalBatch
    parameters: int
    steps: int  # of a block


@dataclass
class Worker:
    """Times blocks of steps, and keeps the loops it has built."""

    runtime: Runtime
    block_seconds: float
    subjects: dict[tuple[str, str, int], Subject] = field(default_factory=dict)

    def answer(self, task: dict[str, Any]) -> dict[str, Any]:
        """Time one block.

        Args:
            task: model and way; batch, over all processes; threads of a process; and agree, whether processes agree
                on stopping: "paced" as they do in training, at "each step", or "no".

        Returns:
            seconds of a step (of the slowest process), seconds of computing in a step (of all threads of a process,
            the mean), bytes that a process sends in a step (the mean; None where it cannot be seen), parameters,
            steps of a block. Or refused: why the model cannot be trained this way.
        """
        torch.set_num_threads(task["threads"])
        name = task["model"], task["way"], task["batch"]
        try:
            if name not in self.subjects:
                self.subjects[name] = self._build(*name)
        except NotImplementedError as error:  # FSDP2 takes no channels_last parameters (torch 2.13)
            return {"refused": str(error)}
        subject = self.subjects[name]
        with Preemption(self.runtime.control) as preemption:
            agree = {
                "no": lambda: None,
                "paced": preemption.agree,
                "each step": partial(preemption.agree, at_once=True),
            }[task["agree"]]
            self.runtime.gather(torch.zeros(1))  # all begin together
            sent, computed = count_sent_bytes(), time.process_time()
            seconds = self._time(subject, subject.steps, agree)
            preemption.settle()
            computed, sent = time.process_time() - computed, count_sent_bytes() - sent
        everyone = self.runtime.share((seconds, computed, sent))
        means = [sum(values) / len(everyone) / subject.steps for values in zip(*everyone)]
        on_sockets = self.runtime.device.type == "cpu" and sys.platform == "linux"
        return {
            "seconds": max(values[0] for values in everyone) / subject.steps,
            "computing": means[1],
            "bytes": means[2] if on_sockets else None,
            "parameters": subject.parameters,
            "steps": subject.steps,
        }

    def _time(self, subject: Subject, steps: int, agree: Callable[[], object] = lambda: None) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            subject.loop.step(subject.batch)
            agree()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.runtime.device.type != "cpu":
            torch.accelerator.synchronize()

    def _build(self, model_name: str, way: str, batch_size: int) -> Subject:
        seed_all(0)
        inputs, share = INPUTS[model_name], batch_size // self.runtime.num_processes
        model = build_model(model_name, inputs, CLASSES).to(self.runtime.device)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        loop: Loop | Exchange = Exchange(torch.zeros(parameters, device=self.runtime.device))
        if way != "exchange":
            loop = self._build_loop(model, way, batch_size, inputs)
        slot = Slot(self.runtime.rank, share, make_inputs(inputs, share, self.runtime.device))
        subject = Subject(loop, GlobalBatch(batch_size, [slot]), parameters, 0)
        self._time(subject, WARM_UP)
        each = self._time(subject, TRIED) / TRIED
        subject.steps = self.runtime.broadcast(max(TRIED, int(self.block_seconds / each)))
        return subject

    def _build_loop(self, model: nn.Module, way: str, batch_size: int, inputs: InputSpec) -> Loop:
        slots = 1 if way == "alone" else self.runtime.num_processes  # buffers are not shared either
        reduction = "exact" if way == "exact" else "fast"
        settings = TrainSettings(batch_size=batch_size, tracker=("none",), dry_run=True, reduction=reduction)
        session = Session(None, None, Batching(batch_size, slots, slots))
        if way in ("ddp", "exact"):
            state = prepare_state(settings, self.runtime, session, model)
        else:
            if way == "fsdp2":
                shard(model)
            state = RunState(model, build_optimizer(settings, model, sharded=way == "fsdp2"), Progress(slots))
        state.model.train()
        loader, measure = Samples(batch_size), make_measure(inputs.names, self.runtime)
        return Loop(settings, self.runtime, session, state, loader, measure, lambda _: {}, Tracker(None), {})


@dataclass
class Exchange:
    """An all-reduce of as many numbers as the model has parameters, and nothing else."""

    flat: torch.Tensor

    def step(self, _: GlobalBatch) -> None:
        """Exchange; a single process has nobody to exchange with."""
        if dist.is_initialized():
            dist.all_reduce(self.flat)


def shard(model: nn.Module) -> None:
    """Shard with FSDP2, each layer a unit of its own. Accelerate declines to do so on CPUs (accelerate 1.15)."""
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            fully_shard(module)
    fully_shard(model)


def make_measure(names: tuple[str, ...], runtime: Runtime) -> Any:
    """Return what computes the cross-entropy and accuracy of each sample, as train/classify.py does."""

    def measure(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with runtime.accelerator.autocast():  # for the ways that Accelerate does not wrap
            logits, labels = model(*(batch[name] for name in names)).float(), batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float()}

    return measure


def make_inputs(inputs: InputSpec, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return noise as a batch of so many samples."""
    batch = {"labels": torch.randint(CLASSES, (count,))}
    if inputs.task == "text":
        batch |= {"tokens": torch.randint(1, WORDS, (count, TOKENS)), "lengths": torch.full((count,), TOKENS)}
    else:
        batch["inputs"] = torch.randn(count, *inputs.shape)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def count_sent_bytes() -> int:
    """Return what this process has sent through its open TCP connections, in bytes, without headers (Linux)."""
    sent = 0
    if sys.platform != "linux":
        return sent
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 8)
                    sent += struct.unpack_from("=Q", info, BYTES_SENT)[0]
        except OSError:  # closed meanwhile, such as the descriptor of the folder itself
            continue
    return sent


def start_worker(block_seconds: float) -> Worker:
    """Start this process's part of the group."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each of several would be alone (accelerate 1.15)
    return Worker(start_runtime(TrainSettings(tracker=("none",), dry_run=True)), block_seconds)


def main() -> None:
    worker = start_worker(float(sys.argv[1]))
    for line in sys.stdin:
        answer = worker.answer(json.loads(line))
        if worker.runtime.is_main:
            print(json.dumps(answer), flush=True)
    worker.runtime.close()


if __name__ == "__main__":
    main()
