"""How many processes the launcher meant to start, from what it leaves in the environment."""

from __future__ import annotations

from collections.abc import Mapping

# What `srun` and `mpirun` tell each of the tasks that they start: how many there are.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def accelerate_meant_several(environment: Mapping[str, str]) -> bool:
    """Say whether `accelerate launch` was told of several processes and started one.

    On CPUs it does so, and leaves an address behind (accelerate 1.15).
    """
    return (
        "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment
    )


def find_several(environment: Mapping[str, str]) -> str | None:
    """Return who asked for more than one process, in words; None if nobody did."""
    if _count(environment, "WORLD_SIZE") > 1:
        return f"the launcher started {environment['WORLD_SIZE']} processes"
    if accelerate_meant_several(environment):
        return "accelerate launch was told of several processes"
    counts: tuple[str, ...] = TASK_COUNTS
    if "SLURM_STEP_NUM_TASKS" not in environment:  # not started by srun: what the job was given
        counts = (*counts, "SLURM_NTASKS")
    for name in counts:
        if _count(environment, name) > 1:
            return f"{name} is {environment[name]}"
    return None


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 1
