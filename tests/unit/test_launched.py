"""A launcher that started another number of processes than it was asked for is found out, and a sound one is not."""

import pytest

from train.engine.errors import UsageError
from train.engine.launched import TASK_COUNTS, check_count, find_several

TRAP = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}  # left by accelerate launch on CPUs
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("name", TASK_COUNTS)
def test_tasks_without_a_launcher_are_refused(name):
    with pytest.raises(UsageError, match=rf"(srun|mpirun) started 4 tasks \({name}\)"):
        check_count(1, {name: "4"})


@pytest.mark.parametrize(
    ("processes", "environment", "words"),
    [
        (2, {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks"),  # launchers that know nothing of others
        (1, {"WORLD_SIZE": "2"}, "started 2 processes but Accelerate sees 1"),
        (2, {"WORLD_SIZE": "4"}, "started 4 processes but Accelerate sees 2"),
        (1, TRAP, "accelerate launch was told of several processes and started one"),
    ],
)
def test_wrong_counts_are_refused(processes, environment, words):
    with pytest.raises(UsageError, match=words):
        check_count(processes, environment)


@pytest.mark.parametrize(
    ("processes", "environment"),
    [
        (1, {}),
        (1, {"ACCELERATE_MIXED_PRECISION": "no"}),
        (1, {**TRAP, "WORLD_SIZE": "1"}),  # torchrun, one process
        (1, {"SLURM_NTASKS": "4"}),  # only room for more
        (2, TORCHRUN),
        (2, {**TRAP, "WORLD_SIZE": "2"}),
        (2, {"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}),  # srun, with ranks from SLURM's variables
        (2, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}),
        (2, {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}),
        (4, {**TORCHRUN, "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}),  # two nodes
    ],
)
def test_sound_launches_pass(processes, environment):
    check_count(processes, environment)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "started 2 processes"),
        ({"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1"}, "started 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS is 3"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"PMI_SIZE": "16"}, "PMI_SIZE is 16"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE is 2"),
        (TRAP, "accelerate launch"),
    ],
)
def test_several_processes_are_found(environment, words):
    assert words in find_several(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": ""},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "2(x2)"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
        {**TRAP, "WORLD_SIZE": "1"},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_one_process_is_one_process(environment):
    assert find_several(environment) is None
