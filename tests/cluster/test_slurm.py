"""launch/slurm.sbatch in a real SLURM: whatever happens to a job, the run ends as if it had not.

Two nodes with a process each, two starts in most tests; a start takes about ten seconds on two cores.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import ROOT, SETTINGS, STEPS, PacedRuns


class Jobs(PacedRuns):
    """Runs jobs in a folder of its own."""

    def __init__(self, folder, slurm):
        super().__init__(folder)
        self.slurm = slurm

    def submit(self, name, *flags, options=("--nodes=2",), tracker="none", **environment):
        """Submit a run; return the number of its job."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**self.slurm.environment, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
        options = ["--parsable", f"--output={self.folder / name}.out", *options]
        command = ["launch/slurm.sbatch", "tests/cluster/paced.py", "--tracker", tracker, *SETTINGS, *flags]
        place = ["--output_dir", self.folder, "--run_name", name]
        return self.slurm.command("sbatch", *options, *command, *place, cwd=ROOT, env=environment)

    def decisions(self, name):
        """Return what the batch script said."""
        return (self.folder / f"{name}.out").read_text()

    def printed(self, name, node):
        """Return what a node printed."""
        return (self.folder / name / "logs" / f"node-{node}.txt").read_text()

    def describe(self):
        """Return what helps where a run does not go on."""
        return self.slurm.describe()

    def assert_done(self, name, job, straight="straight", seconds=240):
        """Fail unless the job is done, and its run equals the one without interruption."""
        ended = self.slurm.wait_end(job, seconds)
        assert ended["JobState"] == "COMPLETED", self.decisions(name) + self.printed(name, 0)
        self.assert_whole(name, straight)
        return ended


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, slurm):
    """A folder for jobs, with the run `straight` on two processes without SLURM."""
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), slurm)
    jobs.run("straight", *SETTINGS, processes=2)
    return jobs


def test_two_nodes_to_the_end(jobs):
    job = jobs.submit("plain")
    jobs.assert_done("plain", job)
    assert "2 process(es)" in jobs.printed("plain", 0)
    assert "node 1 is n2" in jobs.printed("plain", 1)
    assert f"SLURM_JOB_ID={job}\n" in (jobs.folder / "plain" / "logs" / "slurm.txt").read_text()


def test_requeued_from_outside_with_one_wandb_run(jobs):
    job = jobs.submit("requeued", tracker="wandb", STEP_SECONDS="0.3")
    identity = jobs.wait_step("requeued", 8)
    jobs.slurm.command("scontrol", "requeue", job)
    ended = jobs.assert_done("requeued", job)
    assert ended["Restarts"] == "1"
    assert "TERM: waiting for the run to save" in jobs.decisions("requeued")
    assert jobs.identity("requeued") == identity
    starts = json.loads((jobs.folder / "requeued" / "run.json").read_text())["starts"]
    assert [start["scheduler"]["SLURM_JOB_ID"] for start in starts] == [job, job]
    assert "SLURM_RESTART_COUNT" not in starts[0]["scheduler"] and starts[1]["scheduler"]["SLURM_RESTART_COUNT"] == "1"
    offline = [path.name.rpartition("-")[2] for path in (jobs.folder / "requeued" / "wandb").glob("offline-run-*")]
    assert offline == [identity, identity]


def test_warned_of_the_time_limit(jobs):
    job = jobs.submit("warned", STEP_SECONDS="0.3")
    identity = jobs.wait_step("warned", 8)
    jobs.slurm.command("scancel", "--batch", "--signal=USR1", job)
    ended = jobs.assert_done("warned", job)
    assert ended["Restarts"] == "1"
    assert "exit code 75" in jobs.decisions("warned")
    assert jobs.identity("warned") == identity


def test_cancelled_saves_and_is_not_requeued(jobs):
    job = jobs.submit("cancelled", STEP_SECONDS="0.3")
    jobs.wait_step("cancelled", 8)
    jobs.slurm.command("scancel", job)
    ended = jobs.slurm.wait_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    jobs.slurm.wait_idle()
    assert "exit code 75" in jobs.decisions("cancelled")
    assert "saved at step" in jobs.printed("cancelled", 0)
    assert jobs.slurm.job(job)["JobState"] == "CANCELLED"


def test_crash_is_tried_again_only_after_a_new_checkpoint(jobs):
    job = jobs.submit("crashed", CRASH_AFTER="10")
    ended = jobs.slurm.wait_end(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "1", "1:0")
    assert jobs.steps("crashed")[-1] == 8
    first, second = jobs.decisions("crashed").split("start 1 ")
    assert "requeued, because it ended early, after a new checkpoint" in first
    assert "exit code 1, checkpoint step_00000008: the end" in second


def test_lost_node(jobs):
    job = jobs.submit("lost", STEP_SECONDS="0.5")
    identity = jobs.wait_step("lost", 8)
    jobs.wait_line("lost", 10)  # which is to be taken back
    jobs.slurm.lose_node("n2")
    assert jobs.steps("lost")[-1] == 8
    try:
        jobs.slurm.wait_restart(job)
    finally:
        jobs.slurm.start_node("n2")
    jobs.assert_done("lost", job)
    assert jobs.identity("lost") == identity


def test_array_runs_a_seed_per_task(jobs):
    job = jobs.submit("seeds", options=("--nodes=1", "--array=0-1"))
    for seed in (0, 1):
        jobs.run(f"straight-{seed}", *SETTINGS, "--seed", str(seed))
        jobs.assert_done(f"seeds-{seed}", f"{job}_{seed}", straight=f"straight-{seed}")
    assert jobs.file("seeds-0", STEPS) != jobs.file("seeds-1", STEPS)


@pytest.mark.slow
def test_real_time_limit_twice(jobs):
    # SLURM looks at the limits every 30 seconds: 20 seconds ahead of a minute means 10 to 40 after the start.
    options = ("--nodes=2", "--time=1", "--signal=B:USR1@20")
    job = jobs.submit("limited", options=options, STEP_SECONDS="2", SLOW_STARTS="2")
    identity = jobs.wait_step("limited", 4)
    # Where a start takes longer than most of these, nine were not enough within 240 seconds.
    ended = jobs.assert_done("limited", job, seconds=600)
    restarts = int(ended["Restarts"])
    assert restarts >= 2  # a busy machine needs more
    assert jobs.decisions("limited").count("requeued, because the time limit was near") == restarts
    assert jobs.identity("limited") == identity
