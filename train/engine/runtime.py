"""Processes, device and precision of a run, through Accelerate; and how processes agree on things."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from train.engine.deepspeed import check_deepspeed, check_installed
from train.engine.errors import TrainingError, UsageError
from train.engine.launched import check_count
from train.engine.memory import keep_freed_memory
from train.engine.randomness import seed_all, use_deterministic_algorithms
from train.engine.settings import RunSettings

Value = TypeVar("Value")
PREPARATION_HOURS = 12


@dataclass
class Runtime:
    """What every part of a run needs to know of the machine."""

    accelerator: Accelerator
    control: dist.ProcessGroup | None  # gloo, for small messages between CPUs; None with one process
    patient: dist.ProcessGroup | None = None  # the same, for preparing data, which may take one process hours
    asked_to_stop: Callable[[], bool] = lambda: False  # the same on all processes, which must call it together

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def broadcast(self, value: Value, group: dist.ProcessGroup | None = None) -> Value:
        """Return rank 0's value on every process, through `group` or the control group."""
        if self.control is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=group or self.control)
        return box[0]

    def on_main(self, work: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
        """Run `work` on rank 0 and return its value everywhere.

        Raises:
            ValueError, TrainingError: on every process, if rank 0 raised it; nobody is left waiting.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = work()
            except (ValueError, TrainingError) as error:
                outcome = error
        outcome = self.broadcast(outcome, group)
        if isinstance(outcome, (ValueError, TrainingError)):
            raise outcome
        return outcome

    def main_first(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0, then on the others, which find rank 0's cached files.

        Raises:
            ValueError: on every process, if rank 0 raised it.
        """
        mine: list[Value] = []
        self.on_main(lambda: mine.append(work()), self.patient)
        return mine[0] if self.is_main else work()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, on the CPU in float64."""
        values = values.detach().to("cpu", torch.float64)
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return the CPU tensors of all processes, in the order of the ranks; shapes must agree."""
        if self.control is None:
            return [values]
        everyone = [torch.empty_like(values) for _ in range(self.num_processes)]
        dist.all_gather(everyone, values.contiguous(), group=self.control)
        return everyone

    def share(self, value: Value) -> list[Value]:
        """Return the plain values of all processes, in the order of the ranks."""
        if self.control is None:
            return [value]
        everyone: list[Any] = [None] * self.num_processes
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def close(self) -> None:
        """Leave the process group together: a launcher would take the first to leave for a failure of the others."""
        if self.control is not None:
            dist.barrier(self.control)
        if dist.is_initialized():
            dist.destroy_process_group()


def start_runtime(settings: RunSettings) -> Runtime:
    """Start Accelerate, check what it made of the request, and seed everything.

    Raises:
        UsageError: the precision or the wrapper asked for is not to be had on this device, the launcher started
            another number of processes than it was asked for, or processes were started with different settings.
    """
    check_installed()
    timeout = timedelta(seconds=settings.timeout_seconds)
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision,
            # Without this, several CPU processes silently become several single ones (accelerate 1.15).
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[
                # Buffers are kept equal by the loop, by a rule that does not depend on the number of processes.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"--mixed_precision {settings.precision}: {error}") from error
    check_deepspeed(accelerator)
    precision = accelerator.mixed_precision
    if precision == "fp16" and accelerator.scaler is None:  # Accelerate would go on without loss scaling
        raise UsageError(f"mixed precision fp16 is not to be had on {accelerator.device.type}: choose bf16 or no")
    if settings.precision not in (None, precision):
        raise UsageError(f"--mixed_precision {settings.precision}: Accelerate would use {precision!r}")
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise UsageError(
            f"the launcher chose {kind.value}: use plain processes, DeepSpeed, or FSDP with fsdp_version: 2"
        )
    if kind != DistributedType.FSDP and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UsageError(
            f"the launcher chose FSDP, but Accelerate would train without it on {accelerator.device.type}: FSDP needs "
            "GPUs; choose another file of launch/"
        )
    check_count(accelerator.num_processes, os.environ)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    seed_all(settings.seed)
    if settings.deterministic:
        use_deterministic_algorithms()
    else:
        torch.backends.cudnn.benchmark = True
    if accelerator.num_processes == 1:
        return Runtime(accelerator, None)
    control = dist.new_group(backend="gloo", timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=PREPARATION_HOURS))
    runtime = Runtime(accelerator, control, patient)
    _check_same_command(runtime, settings)
    return runtime


def _check_same_command(runtime: Runtime, settings: RunSettings) -> None:
    """See that all processes have the same script and settings; else they would train apart, or wait for each other.

    Raises:
        UsageError: on all processes: says which settings differ, and where.
    """
    mine = {"script": Path(sys.argv[0]).name, **dataclasses.asdict(settings)}
    everyone = runtime.share((socket.gethostname(), mine))
    _, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            told = ", ".join(f"{name} {other.get(name)!r} instead of {first.get(name)!r}" for name in names)
            raise UsageError(
                f"rank {rank} on {host} was started with another command than rank 0: {told}. Give all machines the "
                "same one"
            )
