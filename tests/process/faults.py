"""Things that happen to a rank: kills at an exact step, signals, broken disks. Each takes the rank first."""

import errno
import os
import signal
import sys


def die_after(rank, step, victim=0):
    """SIGKILL the process right after an optimizer step, before anything of that step is logged or saved."""
    from train.engine.loop import Loop

    inner = Loop._between_steps

    def between_steps(self, *arguments):
        if rank == victim and self.state.progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, *arguments)

    Loop._between_steps = between_steps


def signal_after(rank, step, number, victim=0):
    """Send a signal to the process itself right after an optimizer step."""
    from train.engine.loop import Loop

    inner = Loop.step

    def one_step(self, batch):
        inner(self, batch)
        if rank == victim and self.state.progress.step == step:
            os.kill(os.getpid(), number)

    Loop.step = one_step


def signal_stateful(rank, update, number):
    """Send a signal, which may be SIGKILL, to a stateful run right after an update, before it is logged or saved."""
    from train.stateful.loop import StatefulLoop

    until_due, inner = StatefulLoop._updates_until_due, StatefulLoop._advance

    def updates_until_due(self):
        left = update - self.state.progress.step
        return min(until_due(self), left) if left > 0 else until_due(self)

    def advance(self):
        inner(self)
        if self.state.progress.step == update:
            os.kill(os.getpid(), number)

    StatefulLoop._updates_until_due, StatefulLoop._advance = updates_until_due, advance


def draw_nothing(rank):
    """Leave out the pictures of the data and of the end of a run."""
    import data_modules.look
    from train.engine import session
    from train.evaluation import confusion
    from train.stateful import report

    session.draw_curves = report.draw_answers = data_modules.look.draw_batch = lambda *_: None
    confusion.draw_confusion_matrix = lambda *_: None


def poison_loss(rank, step, value, count):
    """Make the loss NaN or infinite at `count` steps from `step` on; on the last rank only, if there are several."""
    from train.engine.loop import Loop

    inner = Loop._forward_backward
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1

    def forward_backward(self, slot, batch_size, **options):
        measure = self.measure
        if rank == last and step <= self.state.progress.step + 1 < step + count:
            self.measure = lambda *arguments: {
                name: metric + float(value) if name == "loss" else metric
                for name, metric in measure(*arguments).items()
            }
        try:
            return inner(self, slot, batch_size, **options)
        finally:
            self.measure = measure

    Loop._forward_backward = forward_backward


def use_fsdp2(rank, *layers):
    """Make Accelerate shard the model with FSDP2, which it declines to do on CPUs (accelerate 1.15): test code only.

    It is told to between the start of the processes and `prepare`; what follows is what it does on GPUs. Modules of
    the classes `layers` become units of their own, with activations that are computed again in the backward pass.
    Without any, the variables that `accelerate launch` leaves say how to shard, if they do.
    """
    from accelerate import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.fsdp import FSDPModule

    from train.engine import runtime, session

    start, prepare = runtime.start_runtime, session.prepare_state
    options = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": list(layers),
        "activation_checkpointing": bool(layers),
    }
    if "FSDP_VERSION" in os.environ:
        options = {}

    def start_runtime(settings):
        started = start(settings)
        plugin = FullyShardedDataParallelPlugin(**options)
        if (precision := started.accelerator.mixed_precision) != "no":
            plugin.set_mixed_precision(precision)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for states in (PartialState._shared_state, AcceleratorState._shared_state):
            states["distributed_type"] = DistributedType.FSDP
        return started

    def prepare_state(settings, runtime, *arguments):
        state = prepare(settings, runtime, *arguments)
        names = [name for name, _ in state.model.named_modules()]
        kinds = {type(parameter).__name__ for parameter in state.model.parameters()}
        recomputed = sum(name.endswith("_checkpoint_wrapped_module") for name in names)
        units = sum(isinstance(module, FSDPModule) for module in state.model.modules())
        runtime.say(f"parameters: {', '.join(kinds)}; modules computed again: {recomputed}; units: {units}")
        return state

    runtime.start_runtime, session.prepare_state = start_runtime, prepare_state


def use_deepspeed(rank, stage):
    """Let DeepSpeed train, which Accelerate leaves alone on CPUs (accelerate 1.15): test code only.

    DeepSpeed would compile an exchange through shared memory first, for minutes; gloo does without.
    """
    from accelerate import DeepSpeedPlugin, DistributedType
    from accelerate.state import AcceleratorState, PartialState
    from deepspeed import ops

    from train.engine import runtime
    from train.engine.deepspeed import check_deepspeed

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    start = runtime.start_runtime

    def start_runtime(settings):
        started = start(settings)
        plugin = DeepSpeedPlugin(zero_stage=stage)
        plugin.set_mixed_precision(started.accelerator.mixed_precision)
        plugin._set_selected(True)
        AcceleratorState._shared_state["deepspeed_plugins"] = plugin
        for states in (PartialState._shared_state, AcceleratorState._shared_state):
            states["distributed_type"] = DistributedType.DEEPSPEED
        check_deepspeed(started.accelerator)
        return started

    runtime.start_runtime = start_runtime


def compile_nothing(rank):
    """Let `--compile` wrap the model and run its graphs as they are; compiling them takes minutes on a CPU."""
    import functools

    import torch

    torch.compile = functools.partial(torch.compile, backend="eager")


def fill_disk(rank, writes):
    """Let the disk be full after so many writes of the engine, in the middle of the next one."""
    from train.engine import storage

    class FullDisk:
        count = 0

        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, descriptor, content):
            self.count += 1
            if self.count <= writes:
                return os.write(descriptor, content)
            os.write(descriptor, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.os = FullDisk()


def use_loss_scaler(rank):
    """Scale losses as with fp16 on a GPU; the scale grows every third step."""
    import torch

    import train.engine.runtime

    inner = train.engine.runtime.start_runtime

    def start_runtime(settings):
        runtime = inner(settings)
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
        return runtime

    train.engine.runtime.start_runtime = start_runtime


def set_attribute(rank, module, name, value):
    """Give a constant of a module another value."""
    import importlib

    assert hasattr(importlib.import_module(module), name)
    setattr(importlib.import_module(module), name, value)


def touch_after(rank, step, path):
    """Make a file right after an optimizer step, on rank 0."""
    from train.engine.loop import Loop

    inner = Loop.step

    def one_step(self, batch):
        inner(self, batch)
        if rank == 0 and self.state.progress.step == step:
            open(path, "w").close()

    Loop.step = one_step


def signal_in_evaluation(rank, step, number, batches, victim=0):
    """Send a signal to the process itself in the evaluation after a step, before its batch number `batches`."""
    from train.engine import evaluation
    from train.engine.loop import Loop

    inner, add_up = Loop._evaluate, evaluation.add_up
    left = []

    def evaluate(self):
        if rank == victim and self.state.progress.step == step:
            left.append(batches)
        return inner(self)

    def count(*arguments):
        if left:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
                left.clear()
        return add_up(*arguments)

    Loop._evaluate, evaluation.add_up = evaluate, count


def sleep_in_step(rank, step, seconds):
    """Say so and sleep in the midst of a step."""
    import time

    from train.engine.loop import Loop

    inner = Loop.step

    def one_step(self, batch):
        if self.state.progress.step == step:
            print("asleep", flush=True)
            time.sleep(seconds)
        inner(self, batch)

    Loop.step = one_step


def sleep_in_save(rank, seconds):
    """Say so and sleep before a checkpoint is saved."""
    import time

    from train.engine.saver import Saver

    inner = Saver.save

    def save(self):
        print("asleep", flush=True)
        time.sleep(seconds)
        inner(self)

    Saver.save = save


def sleep_in_preparation(rank, seconds):
    """Say so and sleep instead of loading data."""
    import time

    import data_modules.load

    inner = data_modules.load.load_data

    def load_data(*arguments, **options):
        print("asleep", flush=True)
        time.sleep(seconds)
        return inner(*arguments, **options)

    data_modules.load.load_data = load_data


def signal_wandb(rank, step, number):
    """Send a signal to the process that W&B talks through, right after an optimizer step."""
    import psutil

    from train.engine.loop import Loop

    inner = Loop.step

    def one_step(self, batch):
        inner(self, batch)
        if self.state.progress.step == step:
            (core,) = [one for one in psutil.Process().children(recursive=True) if one.name() == "wandb-core"]
            core.send_signal(number)
            if number == signal.SIGKILL:
                core.wait()

    Loop.step = one_step


def sit_at_terminal(rank):
    """Let input and output be a terminal at which nobody types; what is written there goes to the output too."""
    import threading

    output = os.dup(1)
    master, terminal = os.openpty()
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    sys.stdin = os.fdopen(0)
    assert all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))

    def copy():
        while True:
            os.write(output, os.read(master, 4096))

    threading.Thread(target=copy, daemon=True).start()


def leave_unused(rank):
    """Give the model a parameter that its answers do not depend on."""
    import torch

    from train import classify

    build = classify.build_model

    def build_model(*arguments):
        model = build(*arguments)
        model.idle = torch.nn.Parameter(torch.zeros(3))
        return model

    classify.build_model = build_model


def hide_package(rank, name):
    """Let a package be missing, for those who ask whether it is there."""
    import importlib.util

    inner = importlib.util.find_spec
    importlib.util.find_spec = lambda wanted, *arguments: None if wanted == name else inner(wanted, *arguments)
