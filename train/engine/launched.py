"""How many processes the launcher meant to start, from what it leaves in the environment."""

from __future__ import annotations

from collections.abc import Mapping

from train.engine.errors import UsageError

# What `srun` and `mpirun` tell each of the tasks that they start: how many there are.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def accelerate_meant_several(environment: Mapping[str, str]) -> bool:
    """Say whether `accelerate launch` was told of several processes and started one.

    On CPUs it does so, and leaves an address behind (accelerate 1.15).
    """
    return (
        "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment
    )


def check_count(num_processes: int, environment: Mapping[str, str]) -> None:
    """Compare the number of processes with what the launcher left in the environment.

    Raises:
        UsageError: several processes were started that know nothing of each other, or fewer than were asked for.
    """
    launched = _count(environment, "WORLD_SIZE")
    if num_processes != launched:
        raise UsageError(
            f"the launcher started {launched} processes but Accelerate sees {num_processes}: on CPUs, start them with "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    if num_processes == 1 and accelerate_meant_several(environment):
        raise UsageError(
            "accelerate launch was told of several processes and started one, as it does on CPUs whatever it is told: "
            "use --config_file launch/multi_cpu.yaml --num_processes N"
        )
    alone = "TORCHELASTIC_RUN_ID" in environment and _count(environment, "LOCAL_WORLD_SIZE") == num_processes
    for name in TASK_COUNTS:
        tasks = _count(environment, name)
        if tasks > 1 and (num_processes < tasks or alone):
            starter = "srun" if name.startswith("SLURM") else "mpirun"
            raise UsageError(
                f"{starter} started {tasks} tasks ({name}), and each of them would be a run of its own: start one "
                f"launcher on each node, as launch/slurm.sbatch does (in an interactive shell: unset {name})"
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
