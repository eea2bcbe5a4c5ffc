"""The global batch cut into slots: how many samples go where, on this number of processes."""

from __future__ import annotations

from dataclasses import dataclass

from train.engine.errors import UsageError
from train.engine.settings import TrainSettings


@dataclass(frozen=True)
class Batching:
    """How a global batch is cut. A slot is what one process takes in one forward pass."""

    batch_size: int
    slots: int
    num_processes: int

    @property
    def accumulation(self) -> int:
        """Forward passes of one process per optimizer step."""
        return self.slots // self.num_processes

    def __str__(self) -> str:
        return (
            f"batch {self.batch_size} = {self.num_processes} process(es) x {self.accumulation} pass(es) x "
            f"{self.batch_size // self.slots} samples"
        )


def plan_batching(settings: TrainSettings, num_processes: int, saved_slots: int | None = None) -> Batching:
    """Cut the batch for this number of processes.

    Args:
        settings: the run's.
        num_processes: of this start.
        saved_slots: slots of the checkpoint that is resumed. They stay as they are where the processes divide them.

    Raises:
        UsageError: something does not divide; names the nearest batch sizes that do. Or the saved slots cannot be
            kept and the user has not agreed to that. Or there is no balanced tree for --reduction exact.
    """
    batching = _cut(settings, num_processes, saved_slots)
    if settings.reduction == "exact":
        for name, number in (("slots", batching.slots), ("processes", num_processes)):
            if number & (number - 1):
                raise UsageError(f"--reduction exact needs a power of two; there are {number} {name}")
    return batching


def _cut(settings: TrainSettings, num_processes: int, saved_slots: int | None) -> Batching:
    size, slots = settings.batch_size, settings.slots
    micro = settings.micro_batch_size
    if saved_slots is not None:
        same = slots in (None, saved_slots) and micro in (None, size // saved_slots)
        if saved_slots % num_processes == 0 and same:
            return Batching(size, saved_slots, num_processes)
        if "slots" not in settings.allow_changes:
            raise UsageError(
                f"the run was started with {saved_slots} slot(s), now there are {num_processes} process(es)"
                + (f", --slots {slots}" if slots else "")
                + (f", --micro_batch_size {micro}" if micro else "")
                + ": samples, schedule and augmentation would stay the same, dropout masks would differ. Use a number "
                f"of processes that divides {saved_slots}"
                + ("" if same else f" and passes of {size // saved_slots} samples")
                + ", or add --allow_changes slots"
            )
    if slots is None:
        slots = num_processes if micro is None else max(1, size // micro)
        unit = num_processes if micro is None else num_processes * micro
        parts = f"{num_processes} process(es)" + ("" if micro is None else f" x --micro_batch_size {micro}")
    else:
        unit = slots
        parts = f"--slots {slots}"
        if slots % num_processes:
            raise UsageError(f"--slots {slots}: must be a multiple of the {num_processes} processes")
        if micro is not None and micro * slots != size:
            raise UsageError(f"--slots {slots} x --micro_batch_size {micro} is not --batch_size {size}; leave one out")
    if size % unit:
        below, above = size // unit * unit, (size // unit + 1) * unit
        nearest = f"{below} and {above}" if below else f"{above}"
        raise UsageError(f"--batch_size {size} does not divide into {parts}; the nearest sizes that do: {nearest}")
    return Batching(size, slots, num_processes)
