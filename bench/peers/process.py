"""Starts a peer as a process of its own, with a terminal for its progress bar, and hands on what it says."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_peer(peer: str, threads: int, caches: str | None = None, **options: object) -> Iterator[dict[str, Any]]:
    """Yield the lines of JSON that a peer prints.

    Args:
        peer: name of a module beside this one.
        threads: that torch may use.
        caches: folder for decoded images and converted tables; None: where the user has them.
        options: as `clock.parse` has them.

    Raises:
        RuntimeError: the peer failed; ends with what it said on stderr.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if caches is not None:
        environment |= {"XDG_CACHE_HOME": caches, "HF_HOME": str(Path(caches) / "huggingface")}
    reading, writing = pty.openpty()
    said: list[bytes] = []
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as folder:
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        process = subprocess.Popen(
            [sys.executable, "-m", f"bench.peers.{peer}", "--folder", folder, *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=writing, text=True,
        )  # fmt: skip
        os.close(writing)
        listener = threading.Thread(target=_listen, args=(reading, said))
        listener.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):  # some peers print words as well
                    try:
                        values = json.loads(line)
                    except ValueError:
                        continue
                    yield values
            process.wait()
        finally:
            process.kill()
            process.wait()
            listener.join()
            os.close(reading)
    if process.returncode:
        raise RuntimeError(f"{peer} failed:\n{b''.join(said).decode(errors='replace')[-3000:]}")


def _listen(terminal: int, said: list[bytes]) -> None:
    """Read what a process writes to its terminal, lest it waits."""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            return
        if not part:
            return
        said.append(part)
        del said[:-20]
