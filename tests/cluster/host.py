"""What the fixtures of this folder ask of the machine that they run on: packages and processes."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path


def install_missing(programs, packages) -> str | None:
    """Install packages where programs are missing and that is possible; return what is missing still, or None."""
    with open(Path(tempfile.gettempdir()) / "tests-cluster-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of pytest-xdist
        if _missing(programs) and shutil.which("apt-get"):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
            for command in (["apt-get", "update"], install):
                subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False)
    missing = _missing(programs)
    return f"not installed, and apt-get could not: {' '.join(missing)}" if missing else None


def _missing(programs) -> list[str]:
    return [program for program in programs if shutil.which(program) is None]


def all_processes() -> list[int]:
    """Return the numbers of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_process(pid, name) -> bytes:
    """Return a file of a process below /proc; nothing if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def parent_of(pid) -> int:
    """Return the parent of a process; 0 if the process is gone."""
    fields = read_process(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def kill_all(pids) -> None:
    """SIGKILL processes that may be gone already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
