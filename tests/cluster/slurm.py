"""A real SLURM on this machine: munged, slurmctld and two slurmd, in a folder of their own."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.host import all_processes, install_missing, kill_all, parent_of, read_process

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdTimeout=10
KillWait=30
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing_reason() -> str | None:
    """Install SLURM where that is possible; return why there is none, or None."""
    if os.geteuid() != 0:  # munged and slurmd want to own their files and change user
        return "SLURM's daemons have to be started by root"
    return install_missing(PROGRAMS, PACKAGES)


class Slurm:
    """Starts the daemons, runs commands of SLURM, and leaves nothing behind."""

    def __init__(self) -> None:
        # Below /tmp: a socket's path may have 107 characters. The secret daemon refuses a folder that others may not
        # enter, and pytest's have mode 700.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        for name in ("run", "log", "state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(3)
        # Job numbers decide on ports and stop files: another SLURM on this machine must have others.
        configuration = CONFIGURATION.format(host=host, folder=self.folder, ports=ports, first=20 * ports[0])
        (self.folder / "slurm.conf").write_text(configuration)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}
        # Ends all when its input does: when this process leaves, or is killed, as pytest-xdist does with its workers.
        keeper = [sys.executable, "-m", "tests.cluster.slurm", str(self.folder)]
        self._keeper = subprocess.Popen(keeper, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)

    def __enter__(self):
        try:
            run, log = self.folder / "run", self.folder / "log"
            socket_path = run / "munge.socket"
            self._start(
                "munged", "-F", f"--socket={socket_path}", f"--key-file={self.folder / 'munge.key'}",
                f"--log-file={log / 'munged.log'}", f"--pid-file={run / 'munged.pid'}",
                f"--seed-file={run / 'munge.seed'}",
            )  # fmt: skip
            self._wait_until(socket_path.exists)
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_idle()
        except BaseException:  # Ctrl-C too: what has started is ended before it is raised again
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._keeper.communicate()

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def start_node(self, node) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def lose_node(self, node) -> None:
        """SIGKILL a node's daemon and everything that runs on it, as when its power is cut."""
        tasks = _processes(self.folder, f"SLURMD_NODENAME={node}".encode())
        parents = {parent_of(task) for task in tasks}
        stepds = {pid for pid in parents if pid > 1 and b"slurmstepd" in read_process(pid, "cmdline")}
        self.daemons[node].kill()
        kill_all(stepds | tasks)
        self.daemons[node].wait()

    def wait_idle(self) -> None:
        """Wait until all nodes are free."""
        self._wait_until(lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) == str(len(NODES)))

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def command(self, *arguments, check=True, **options) -> str:
        """Run a command of SLURM and return its output."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60, **options}
        finished = subprocess.run([str(argument) for argument in arguments], **options)
        assert finished.returncode == 0 or not check, (arguments, finished.stderr)
        return finished.stdout.strip()

    def job(self, number) -> dict[str, str]:
        """Return what scontrol says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "-o", number)))

    def wait_end(self, number, seconds=240) -> dict[str, str]:
        """Wait until a job has ended for good, and return what scontrol says of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._wait_until(lambda: self.job(number)["JobState"] in ended, seconds)
        return self.job(number)

    def wait_restart(self, number) -> None:
        """Wait until a job was put back into the queue."""
        self._wait_until(lambda: self.job(number)["Restarts"] != "0", 60)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def _start(self, program, *arguments, name=None) -> None:
        name = name or program
        with open(self.folder / "log" / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdout=output, stderr=output
            )

    def _wait_until(self, condition, seconds=30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.describe()
            time.sleep(0.1)

    def describe(self) -> str:
        """Return the state of all jobs and the ends of the daemons' logs."""
        logs = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in (self.folder / "log").iterdir()]
        return "\n".join([self.command("scontrol", "show", "job", check=False), *logs])


def end_all(folder: Path) -> None:
    """SIGKILL all processes of the SLURM in that folder, and remove the folder."""
    while found := _processes(folder):
        kill_all(found)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder, also=b"") -> set[int]:
    """Return the processes that belong to a SLURM, and have another variable in their environment."""
    found = set()
    for pid in all_processes():
        environment = read_process(pid, "environ").split(b"\0")
        if f"SLURM_CONF={folder}/slurm.conf".encode() in environment and (not also or also in environment):
            found.add(pid)
    return found


def _free_ports(count) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


if __name__ == "__main__":
    sys.stdin.read()
    end_all(Path(sys.argv[1]))
