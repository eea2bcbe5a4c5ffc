"""launch/start.py on two machines without SLURM: whatever happens to one of them, the run ends as if it had not."""

import os
import signal
import sys
import time

import pytest
from PIL import Image

from tests.cluster.runs import ROOT, SETTINGS, PacedRuns

LOSS_SECONDS = 10  # without a word from another process
TIMEOUT = ("--collective_timeout_seconds", LOSS_SECONDS)
WORKER = (sys.executable, "-u", "tests/cluster/paced.py")  # as torchrun starts it


class Launches(PacedRuns):
    """Runs on a network of two machines with this file system in common."""

    def __init__(self, folder, network):
        super().__init__(folder)
        self.network = network
        self.launchers = []

    def launch(self, name, *flags, restarts=0, meeting_seconds=120, **environment):
        """Start a launcher on each machine."""
        place = ["--tracker", "none", "--output_dir", self.folder, "--run_name", name]
        options = ["--max-restarts", restarts, "--rdzv-conf", f"timeout={meeting_seconds}"]
        self.start_launchers(name, *options, "tests/cluster/paced.py", *place, *SETTINGS, *flags, **environment)

    def start_launchers(self, name, *arguments, **environment):
        """Start a launcher on each machine."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **environment}
        self.launchers = []
        for number in (0, 1):
            command = [
                sys.executable, "launch/start.py", "--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1,
                "--master-addr", self.network.address(0), "--master-port", 29500, *arguments,
            ]  # fmt: skip
            output = self.folder / f"{name}-{number}.txt"
            program = self.network.start(number, *command, output=output, folder=ROOT, environment=environment)
            self.launchers.append(program)

    def describe(self):
        """Return what the launchers printed."""
        return "\n".join(f"== {self.network.name(n)}\n{launcher.printed}" for n, launcher in enumerate(self.launchers))

    def wait(self, seconds=120):
        """Wait for both launchers and return their exit codes."""
        end = time.monotonic() + seconds
        return [launcher.wait(max(0.1, end - time.monotonic())) for launcher in self.launchers]

    def wait_until_said(self, text, seconds):
        """Wait until both have printed a text."""
        self._wait_until(lambda: all(text in launcher.printed for launcher in self.launchers), seconds)

    def assert_done(self, name):
        """Fail unless the run ends by itself, equal to the one without interruption."""
        assert self.wait() == [0, 0], self.describe()
        self.assert_whole(name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with the run `straight` on two processes of one machine."""
    runs = PacedRuns(tmp_path_factory.mktemp("launches"))
    runs.run("straight", *SETTINGS, processes=2)
    return runs.folder


@pytest.fixture
def launches(straight, network):
    return Launches(straight, network)


def test_a_cut_link(launches, network):
    launches.launch("cut", *TIMEOUT, restarts=3, STEP_SECONDS="0.2")
    launches.wait_step("cut", 8)
    network.cut_link(1)
    launches.wait_until_said("waits for other processes in vain", 40)
    network.mend_link(1)
    launches.assert_done("cut")
    first, second = (launcher.printed for launcher in launches.launchers)
    assert "rank 0 on m0 waits for other processes in vain; silent for longest: rank 1 on m1 (process" in first
    assert "rank 1 on m1 waits for other processes in vain; the machine of rank 0 (10.0.0.1) does not answer" in second
    assert "resuming" in first
    assert "Traceback" not in launches.describe() and "frame #" not in launches.describe()


def test_a_short_outage_passes_unnoticed(launches, network):
    launches.launch("outage", "--collective_timeout_seconds", 60, STEP_SECONDS="0.2")
    launches.wait_step("outage", 8)
    network.cut_link(0)
    time.sleep(3)
    network.mend_link(0)
    launches.assert_done("outage")
    assert "2 process(es)" in launches.launchers[0].printed
    assert not any(word in launches.describe() for word in ("in vain", "Traceback", "Error"))


def test_the_first_machine_is_lost(launches, network):
    launches.launch("first", *TIMEOUT, restarts=3, meeting_seconds=15, STEP_SECONDS="0.2")
    launches.wait_step("first", 8)
    launches.wait_line("first", 10)  # which is to be taken back
    network.lose(0)
    left = launches.launchers[1]
    assert left.wait() == 1
    assert "rank 1 on m1 waits for other processes in vain; the machine of rank 0 (10.0.0.1) does not" in left.printed
    assert "m1 waited in vain for machine 0 of 0 to 1, meeting at 10.0.0.1 port 29500" in left.printed
    assert "Traceback" not in left.printed
    network.boot(0)
    launches.launch("first")
    launches.assert_done("first")
    assert "resuming" in launches.launchers[0].printed


def test_another_machine_is_lost(launches, network):
    launches.launch("other", *TIMEOUT, STEP_SECONDS="0.2")
    launches.wait_step("other", 4)
    network.lose(1)
    left = launches.launchers[0]
    assert left.wait() == 1
    assert "rank 0 on m0 waits for other processes in vain; silent for longest: rank 1 on m1 (process" in left.printed
    assert "rank 0 on m0: exit code 1" in left.printed
    assert "Traceback" not in left.printed


def test_a_killed_worker_and_then_one_launcher_is_asked_to_stop(launches, network):
    launches.launch("stopped", restarts=3, STEP_SECONDS="0.2", SLOW_STARTS="2")
    launches.wait_step("stopped", 8)
    (worker,) = network.processes(0, *WORKER)
    os.kill(worker, signal.SIGKILL)
    launches.wait_step("stopped", 20)
    launches.launchers[1].signal(signal.SIGTERM)
    assert launches.wait() == [75, 75], launches.describe()
    saved = launches.steps("stopped")[-1]
    first = launches.launchers[0].printed
    assert f"saved at step {saved}; run the same command again" in first
    assert first.count("2 process(es)") == 2  # one new start was enough
    launches.launch("stopped")
    launches.assert_done("stopped")
    assert f"from step {saved}" in launches.launchers[0].printed


def test_data_that_one_machine_lacks(launches, network):
    data = launches.folder / "data"
    for number in range(30):
        folder = data / "train" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    network.run(1, "mount", "-t", "tmpfs", "none", data)
    launches.launch("lacking", "--dataset", data, "--batch_size", 6)
    assert launches.wait() == [1, 2], launches.describe()
    first, second = (launcher.printed for launcher in launches.launchers)
    assert "error: rank 0 on m0 waits for other processes in vain: see what they printed" in first
    assert f"error: --dataset {data}: the folder holds no file" in second
    assert "Traceback" not in launches.describe() and "frame #" not in launches.describe()
