"""How the launchers of several machines meet and leave, here as threads of one process."""

import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from launch import rendezvous
from tests.process.fleet import free_port


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
