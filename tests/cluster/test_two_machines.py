"""launch/start.py on two machines without SLURM: whatever happens to one of them, the run ends as if it had not."""

import os
import signal
import sys
import time

import pytest

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
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **environment}
        place = ["--tracker", "none", "--output_dir", self.folder, "--run_name", name]
        self.launchers = []
        for number in (0, 1):
            command = [
                sys.executable, "launch/start.py", "--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1,
                "--master-addr", self.network.address(0), "--master-port", 29500, "--max-restarts", restarts,
                "--rdzv-conf", f"timeout={meeting_seconds}", "tests/cluster/paced.py", *place, *SETTINGS, *flags,
            ]  # fmt: skip
            output = self.folder / f"{name}-{number}.txt"
            program = self.network.start(number, *command, output=output, folder=ROOT, environment=variables)
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


def test_to_the_end(launches):
    launches.launch("plain")
    launches.assert_done("plain")
    assert "2 process(es)" in launches.launchers[0].printed
    assert "Traceback" not in launches.describe()


def test_a_cut_link(launches, network):
    launches.launch("cut", *TIMEOUT, restarts=3, STEP_SECONDS="0.3")
    launches.wait_step("cut", 8)
    network.cut_link(1)
    launches.wait_until_said("waits for other processes in vain", 40)
    network.mend_link(1)
    launches.assert_done("cut")
    first, second = (launcher.printed for launcher in launches.launchers)
    assert "rank 0 on m0 waits for other processes in vain; silent for longest: rank 1 on m1 (process" in first
    assert "rank 1 on m1 waits for other processes in vain; the machine of rank 0 (10.0.0.1) does not answer" in second
    assert "resuming" in first
    assert "Traceback" not in launches.describe()


def test_a_short_outage_passes_unnoticed(launches, network):
    launches.launch("outage", "--collective_timeout_seconds", 30, STEP_SECONDS="0.2")
    launches.wait_step("outage", 8)
    network.cut_link(0)
    time.sleep(3)
    network.mend_link(0)
    launches.assert_done("outage")
    assert "in vain" not in launches.describe()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_machine(launches, network, lost):
    name = f"lost-{lost}"
    launches.launch(name, *TIMEOUT, STEP_SECONDS="0.3")
    launches.wait_step(name, 8)
    launches.wait_line(name, 10)  # which is to be taken back
    network.lose(lost)
    left = launches.launchers[1 - lost]
    assert left.wait(40) == 1
    silent = ["the machine of rank 0 (10.0.0.1) does not answer", "silent for longest: rank 1 on m1 (process"][lost]
    assert f"waits for other processes in vain; {silent}" in left.printed
    assert "Traceback" not in left.printed
    network.boot(lost)
    launches.launch(name)
    launches.assert_done(name)
    assert "resuming" in launches.launchers[0].printed


def test_a_machine_that_does_not_come_back(launches, network):
    launches.launch("gone", *TIMEOUT, restarts=3, meeting_seconds=5, STEP_SECONDS="0.3")
    launches.wait_step("gone", 4)
    network.lose(0)
    left = launches.launchers[1]
    assert left.wait(60) == 1
    assert "m1 waited in vain for machine 0 of 0 to 1, meeting at 10.0.0.1 port 29500" in left.printed
    assert "Traceback" not in left.printed


@pytest.mark.parametrize("number", [0, 1])
def test_one_launcher_is_asked_to_stop(launches, number):
    name = f"stopped-{number}"
    launches.launch(name, STEP_SECONDS="0.3")
    launches.wait_step(name, 8)
    launches.launchers[number].signal(signal.SIGTERM)
    assert launches.wait(40) == [75, 75]
    assert "stopped by SIGTERM" in launches.launchers[0].printed
    launches.launch(name)
    launches.assert_done(name)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_worker(launches, network, number):
    name = f"killed-{number}"
    launches.launch(name, restarts=3, STEP_SECONDS="0.3")
    launches.wait_step(name, 8)
    (worker,) = network.processes(number, *WORKER)
    os.kill(worker, signal.SIGKILL)
    launches.assert_done(name)
    assert "resuming" in launches.launchers[0].printed
    assert launches.describe().count("2 process(es)") == 2
