"""Things that happen to a rank: kills at an exact step, signals, broken disks. Each takes the rank first."""

import os
import signal


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

    inner = Loop._step

    def one_step(self, batch):
        inner(self, batch)
        if rank == victim and self.state.progress.step == step:
            os.kill(os.getpid(), number)

    Loop._step = one_step


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
