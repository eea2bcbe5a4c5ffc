"""How the launchers of several machines meet and leave, here as threads of one process."""

import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError

from launch import rendezvous
from tests.process.fleet import free_port

ROOT = Path(__file__).parents[2]


def meet(port, number, seconds=30):
    """Return a launcher's rendezvous."""
    return rendezvous.Meeting("127.0.0.1", port, number, 2, "run", seconds)


def test_each_start_has_a_store_of_its_own_at_one_place():
    port = free_port()
    handlers = [meet(port, number) for number in (0, 1)]
    places = []
    for _ in range(2):
        met = [None, None]

        def come(number, met=met):
            met[number] = handlers[number].next_rendezvous()

        threads = [threading.Thread(target=come, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        first, second = (info.bootstrap_store_info for info in met)
        assert first == second
        assert [info.rank for info in met] == [0, 1]
        places.append(first.master_port)
        assert not met[1].store.check(["word"])
        met[0].store.set("word", "of this start")
    assert places[0] != places[1]


def test_who_does_not_come_is_named():
    with pytest.raises(RendezvousTimeoutError, match="waited in vain for machine 1 of 0 to 1, meeting"):
        meet(free_port(), 0, seconds=2).next_rendezvous()


def test_other_numbers_of_machines_are_named():
    port = free_port()
    smaller, larger = meet(port, 0), rendezvous.Meeting("127.0.0.1", port, 1, 3, "run", 30)
    told = []

    def come():
        with pytest.raises(RendezvousError) as caught:
            larger.next_rendezvous()
        told.append(str(caught.value))

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(RendezvousError, match=r"machine 1 was started for 3 machines, and .* for 2"):
        smaller.next_rendezvous()
    thread.join(60)
    assert "machine 0 was started for 2 machines" in told[0]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError, match=f"port {port} of .* is taken"):
            meet(port, 0).next_rendezvous()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nproc-per-node", "0"], "out of range"),
        (["--nproc-per-node", "two"], "two"),
        (["--nnodes", "2", "--node-rank", "5"], "--node-rank 5: machines are numbered 0 to 1"),
        (["--nnodes", "2", "--master-port", "99999999"], "--master-port 99999999"),
    ],
)
def test_options_that_cannot_be_are_bad_usage(options, words):
    command = [sys.executable, "launch/start.py", *options, "train/classify.py"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.strip().startswith("error: options of the launcher:") and words in finished.stderr
    assert "Traceback" not in finished.stderr


def test_nobody_waits_for_long_for_a_launcher_that_is_gone(monkeypatch, capfd):
    """torchrun's launchers wait for each other for five minutes (torch 2.13)."""
    assert rendezvous.LEAVING_SECONDS <= 10
    monkeypatch.setattr(rendezvous, "LEAVING_SECONDS", 0)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for number in (0, 1):
        group = SimpleNamespace(group_rank=number, group_world_size=3, store=store)
        rendezvous._leave_together(SimpleNamespace(_worker_group=group))
    assert store.check(["leave-0", "leave-1"])
    assert "Error" not in capfd.readouterr().err
