"""launch/slurm.py: what it would submit, and what it refuses. None of these needs a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_SBATCH = """#!/bin/sh
echo "$@" > "$0.arguments"
echo "${FAKE_ANSWER:-4711}"
exit "${FAKE_CODE:-0}"
"""


def run(*arguments, cwd=ROOT, **environment):
    """Run launch/slurm.py, by default where there is no sbatch."""
    command = [sys.executable, ROOT / "launch" / "slurm.py", *arguments]
    environment = {"PATH": "/nowhere", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def login_node(tmp_path):
    """A folder with an sbatch that keeps its arguments, and answers what it is told to."""
    program = tmp_path / "sbatch"
    program.write_text(FAKE_SBATCH)
    program.chmod(0o755)
    return tmp_path


def test_print_shows_the_command_and_submits_nothing(login_node):
    finished = run(
        "--partition", "gpu", "--account", "lab", "--time", "04:00:00", "--nodes", "2", "--gpus", "4", "--cpus", "32",
        "--array", "0-4", "--print", "train/classify.py", "--config", "a b.yaml", "--seed", "1",
        PATH=f"{login_node}:{os.environ['PATH']}",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == (
        "sbatch --job-name=classify --partition=gpu --account=lab --time=04:00:00 --nodes=2 --gpus-per-node=4 "
        "--cpus-per-task=32 --array=0-4 launch/slurm.sbatch train/classify.py --config 'a b.yaml' --seed 1\n"
    )
    assert not (login_node / "sbatch.arguments").exists()


def test_submits_and_says_how_to_go_on(login_node):
    path = f"{login_node}:{os.environ['PATH']}"
    finished = run("--nodes", "2", "train/classify.py", "--seed", "1", PATH=path, FAKE_ANSWER="4711;hpc")
    assert finished.returncode == 0, finished.stderr
    expected = "--parsable --job-name=classify --nodes=2 launch/slurm.sbatch train/classify.py --seed 1\n"
    assert (login_node / "sbatch.arguments").read_text() == expected
    for text in ("job 4711 is", "squeue --job 4711\n", "scancel 4711 ", "slurm-4711.out"):
        assert text in finished.stdout


def test_refused_by_sbatch(login_node):
    path = f"{login_node}:{os.environ['PATH']}"
    finished = run("train/classify.py", PATH=path, FAKE_CODE="1")
    assert finished.returncode == 1
    assert "in the queue" not in finished.stdout


REFUSED = {
    "not on a cluster": ("train/classify.py", "there is no sbatch here: run this on a login node"),
    "no such script": ("--print train/clasify.py", "train/clasify.py: there is no such script"),
    "no script": ("--print --nodes 2", "required: script"),
    "unknown option": ("--print --partion gpu train/classify.py", "--partion"),
    "malformed time": ("--print --time 4h train/classify.py", "'4h' is no time; write 04:00:00"),
    "time that is misread": ("--print --time 04:00 train/classify.py", "SLURM reads 04:00 as minutes and seconds"),
    "malformed count": ("--print --nodes two train/classify.py", "'two' is no number from 1 on"),
    "no node": ("--print --nodes 0 train/classify.py", "'0' is no number from 1 on"),
    "no script of Python": ("--print README.md", "README.md: there is no such script"),
    "option of SLURM after the script": ("--print train/classify.py --nodes 2", "--nodes stands after the script"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    arguments, message = REFUSED[case]
    finished = run(*arguments.split())
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("time", ["90", "04:00:00", "2-0", "2-00:00", "2-00:00:00"])
def test_times_that_slurm_knows(time):
    finished = run("--print", "--time", time, "train/classify.py")
    assert f"--time={time} " in finished.stdout, finished.stderr


def test_run_elsewhere(tmp_path):
    finished = run("--print", "train/classify.py", cwd=tmp_path)
    assert finished.returncode == 2
    assert f"run this in {ROOT}" in finished.stderr
