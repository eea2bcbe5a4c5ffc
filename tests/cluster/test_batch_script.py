"""What launch/slurm.sbatch makes of the command, SLURM's variables and exit codes, with an srun that only answers."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Keeps its arguments and variables, saves a checkpoint, signals the batch script and waits until it was heard.
FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKE/arguments"
env > "$FAKE/variables"
[ -z "$FAKE_STEP" ] || mkdir -p "$FAKE/runs/a/checkpoints/step_$FAKE_STEP"
if [ -n "$FAKE_SIGNAL" ]; then
    kill "-$FAKE_SIGNAL" "$PPID"
    while ! grep -q "$FAKE_SIGNAL: " "$FAKE/said"; do /bin/sleep 0.01; done
    [ ! -e "$EXACT_TRAINING_STOP_FILE" ] || touch "$FAKE/asked"
fi
exit "$FAKE_CODE"
"""
PROGRAMS = {"srun": FAKE_SRUN, "scontrol": '#!/bin/sh\necho "$@" > "$FAKE/requeued"\n', "sleep": "#!/bin/sh\n"}


class Batch:
    """Runs the batch script in a folder."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in PROGRAMS.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def run(self, *command, code=0, step="", signal="", **variables):
        """Run it to its end and return its exit code; srun answers with `code`, a new checkpoint and a signal."""
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "FAKE": str(self.folder), "FAKE_CODE": str(code),
            "FAKE_STEP": step, "FAKE_SIGNAL": signal, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "my job", **variables,
        }  # fmt: skip
        command = command or ("train/classify.py", "--run_name", "a", "--output_dir", f"{self.folder}/runs")
        with open(self.folder / "said", "wb") as said:
            script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *command]
            return subprocess.run(script, env=environment, stdout=said, stderr=said, timeout=60).returncode

    def was(self, name):
        """Say whether something was done."""
        return (self.folder / name).exists()

    def launched(self):
        """Return what srun was told to run, from the script of train/ on."""
        words = (self.folder / "arguments").read_text().splitlines()
        return words[words.index("launcher") + 1 :]

    def variable(self, name):
        """Return a variable of srun's environment."""
        lines = (self.folder / "variables").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get(name)


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path)


# Exit code, new checkpoint, signal to the batch script, and whether the job goes back into the queue.
ENDS = {
    "done": (0, "00000008", "", False),
    "done in the last minute": (0, "00000008", "USR1", False),
    "bad input": (2, "00000008", "", False),
    "preflight failed": (3, "00000008", "", False),
    "time limit": (75, "00000008", "USR1", True),
    "time limit at a step that was saved before": (75, "", "USR1", True),
    "cancelled, or preempted and requeued by SLURM": (75, "00000008", "TERM", False),
    "preempted with a grace period, which the script does not hear of": (75, "00000008", "", True),
    "stopped by hand before the first step": (75, "", "", False),
    "crashed after a checkpoint": (1, "00000008", "", True),
    "crashed before": (1, "", "", False),
    "killed after a checkpoint": (137, "00000008", "", True),
    "crashed while it was cancelled": (1, "00000008", "TERM", False),
}


@pytest.mark.parametrize("case", ENDS)
def test_again_or_not(batch, case):
    code, step, signal, again = ENDS[case]
    (batch.folder / "runs/a/checkpoints/step_00000004").mkdir(parents=True)
    assert batch.run(code=code, step=step, signal=signal) == code
    assert batch.was("requeued") is again, (batch.folder / "said").read_text()
    assert batch.was("asked") is (signal == "USR1")
    assert not Path(tempfile.gettempdir(), "exact-training-stop-4711").exists()


def test_the_run_is_named_after_the_job(batch):
    batch.run("train/classify.py", f"--output-dir={batch.folder}")
    place = ["--output_dir", str(batch.folder), "--run_name", "my-job-4711"]
    assert batch.launched() == ["train/classify.py", f"--output-dir={batch.folder}", *place]
    assert "SLURM_JOB_ID=4711\n" in (batch.folder / "my-job-4711" / "logs" / "slurm.txt").read_text()


@pytest.mark.parametrize(
    "given", [("--run-name=b",), ("--run_name", "b"), ("--run_name", "x=--run_name", "--run-name", "b")]
)
def test_a_name_of_the_command_is_kept(batch, given):
    batch.run("train/classify.py", *given, "--output_dir", str(batch.folder))
    assert batch.launched()[-2:] == ["--run_name", "b"]


def test_a_task_of_an_array_has_its_own_run_and_seed(batch):
    task = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}
    batch.run("train/classify.py", "--output_dir", str(batch.folder), **task)
    assert batch.launched()[-4:] == ["--run_name", "my-job-4700-3", "--seed", "3"]
    batch.run("train/classify.py", "--output_dir", str(batch.folder), "--run_name", "b", "--seed=9", **task)
    assert batch.launched()[-4:] == ["--run_name", "b-3", "--seed", "9"]


def test_processes_and_threads(batch):
    batch.run(SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="34")
    got = [batch.variable(name) for name in ("NPROC", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK", "ACCELERATE_USE_CPU")]
    assert got == ["4", "8", "34", None]
    batch.run(NPROC_PER_NODE="2")
    got = [batch.variable(name) for name in ("NPROC", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK", "ACCELERATE_USE_CPU")]
    assert got == ["2", "1", None, "true"]


def test_submitted_elsewhere(batch):
    assert batch.run(SLURM_SUBMIT_DIR=str(batch.folder)) == 2
    assert "submit in the repository" in (batch.folder / "said").read_text()
    assert not batch.was("arguments")


def test_no_job_of_slurm_is_refused(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    finished = subprocess.run(
        ["bash", ROOT / "launch/slurm.sbatch", "train/classify.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 2
    assert "submit it with sbatch" in finished.stderr
    assert not list(tmp_path.iterdir())
