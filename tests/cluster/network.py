"""Machines with addresses, host names and processes of their own on this one, and links between them that can be cut.

A machine is a process in namespaces of its own, which have no names. It ends when its input does: when the test process
leaves, or is killed. Linux then kills all other processes of the machine and removes its network. The switch is such a
machine too, so nothing changes in the network of this machine, and every network can use the same addresses.
"""

import os
import subprocess
import time
from pathlib import Path

from tests.cluster.host import all_processes, install_missing, parent_of, read_process

PROGRAMS, PACKAGES = ("ip", "nsenter", "unshare"), ("iproute2", "util-linux")
SPACES = ("--net", "--uts", "--mount", "--pid")
START = """\
hosts=$(mktemp) && echo "$2" > "$hosts" && mount --bind "$hosts" /etc/hosts && rm "$hosts" &&
hostname "$1" && ip link set lo up && echo started && exec cat
"""


def missing_reason() -> str | None:
    """Install what is needed where that is possible; return why there can be no machines, or None."""
    if os.geteuid() != 0:
        return "machines of their own have to be made by root"
    missing = install_missing(PROGRAMS, PACKAGES)
    if missing is not None:
        return missing
    trial = "ip link add trial type bridge && ip link add type veth && mount --bind /dev/null /etc/hosts"
    command = ["unshare", *SPACES, "--fork", "--mount-proc", "sh", "-c", trial]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"this kernel or container allows no namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Program:
    """A program on a machine."""

    def __init__(self, command, output, **options):
        self._output = Path(output)
        with open(output, "ab") as file:
            self._start = len(self.output)
            self._enter = subprocess.Popen(command, stdout=file, stderr=file, **options)

    @property
    def output(self) -> str:
        """What the file of its output holds, which may be of several programs."""
        return self._output.read_text()

    @property
    def printed(self) -> str:
        """What this program and those on the same file since printed."""
        return self.output[self._start :]

    def is_running(self) -> bool:
        return self._enter.poll() is None

    def signal(self, number) -> None:
        """Send a signal to the program alone."""
        os.kill(_only_child(self._enter.pid), number)  # nsenter waits for it outside of the machine

    def wait(self, seconds=120) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self._enter.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self.printed}") from None


class Machine:
    """A network, a host name, a file /etc/hosts and process numbers of its own."""

    def __init__(self, name, hosts):
        command = ["unshare", *SPACES, "--fork", "--mount-proc", "--kill-child", "sh", "-c", START, "sh", name, hosts]
        self._unshare = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._unshare.stdout.readline() == b"started\n", name
        self.pid = _only_child(self._unshare.pid)

    def command(self, *arguments) -> list[str]:
        """Return the command that runs another one on this machine."""
        return ["nsenter", f"--target={self.pid}", *SPACES, *map(str, arguments)]

    def run(self, *arguments) -> str:
        """Run a command on this machine and return its output."""
        return subprocess.run(self.command(*arguments), check=True, stdout=subprocess.PIPE, text=True).stdout

    def processes(self, *words) -> list[int]:
        """Return the processes with these words in their command line, by their numbers outside of the machine."""
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for pid in all_processes():
            line = read_process(pid, "cmdline").split(b"\0")
            if all(word.encode() in line for word in words) and _space_of(pid) == here:
                found.append(pid)
        return found

    def end(self) -> None:
        """Kill all of its processes."""
        self._unshare.communicate()


class Network:
    """Machines 0 to N-1, named m0, m1, ..., on one switch."""

    def __init__(self, count):
        known = [f"{self.address(number)} {self.name(number)}" for number in range(count)]
        self._hosts = "\n".join(["127.0.0.1 localhost", *known])
        self._switch = Machine("switch", self._hosts)
        self._machines: dict[int, Machine] = {}
        try:
            self._switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self._switch.run("ip", "link", "set", "bridge", "up")
            for number in range(count):
                self.boot(number)
        except BaseException:  # Ctrl-C too: what has started is ended before it is raised again
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for machine in [*self._machines.values(), self._switch]:
            machine.end()

    @staticmethod
    def name(number) -> str:
        """Return the host name of a machine."""
        return f"m{number}"

    @staticmethod
    def address(number) -> str:
        """Return the address of a machine."""
        return f"10.0.0.{number + 1}"

    # ---- machines ----------------------------------------------------------------------------------------------------

    def boot(self, number) -> None:
        """Start a machine that is not there yet, or was lost."""
        machine = self._machines[number] = Machine(self.name(number), self._hosts)
        link = ["type", "veth", "peer", "name", "eth0", "netns", machine.pid]
        # nsenter --net alone: `ip` looks for the process of the other end among the numbers outside.
        command = ["nsenter", f"--target={self._switch.pid}", "--net", "ip", "link", "add", _port(number), *link]
        subprocess.run(list(map(str, command)), check=True)
        self._switch.run("ip", "link", "set", _port(number), "master", "bridge", "up")
        machine.run("ip", "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        # The same hardware address after a loss: neighbours remember it for a while.
        machine.run("ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{number + 1:02x}", "up")

    def lose(self, number) -> None:
        """End a machine as when its power is cut: nothing that it has not sent yet is sent."""
        self._switch.run("ip", "link", "delete", _port(number))
        self._machines.pop(number).end()

    def cut_link(self, number) -> None:
        """Unplug a machine from the switch."""
        self._switch.run("ip", "link", "set", _port(number), "down")

    def mend_link(self, number) -> None:
        """Plug it in again."""
        self._switch.run("ip", "link", "set", _port(number), "up")

    # ---- programs ----------------------------------------------------------------------------------------------------

    def run(self, number, *arguments) -> str:
        """Run a command on a machine to its end and return its output."""
        return self._machines[number].run(*arguments)

    def start(self, number, *arguments, output, folder, environment) -> Program:
        """Start a program on a machine; append what it prints to a file."""
        inside = ["env", f"--chdir={folder}", *arguments]
        return Program(self._machines[number].command(*inside), output, env=environment)

    def processes(self, number, *words) -> list[int]:
        """Return the processes of a machine with these words in their command line, by their numbers outside of it."""
        return self._machines[number].processes(*words)


def _port(number) -> str:
    return f"port{number}"


def _space_of(pid) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _only_child(parent) -> int:
    end = time.monotonic() + 10
    while True:
        found = [pid for pid in all_processes() if parent_of(pid) == parent]
        if found:
            return found[0]
        assert time.monotonic() < end, "nsenter or unshare started nothing"
