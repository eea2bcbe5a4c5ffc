"""The formulas behind docs/scaling.md, beside numbers worked out by hand."""

import socket
import subprocess
import sys

import pytest

from bench.scaling_formulas import (
    LINKS,
    WORKS,
    Link,
    Traffic,
    Work,
    compute_seconds,
    efficiency,
    exchange_seconds,
    ideal_bytes,
    paper,
    state_bytes,
)

RATE = 1e12
# 1 s of computing on one process, 2 MB of weights.
WORK = Work("small", 0.5e6, 1e9, 1000, 2)


@pytest.mark.parametrize(
    ("way", "processes", "rounds"),
    [
        ("ddp", 1, 0), ("ddp", 2, 1), ("ddp", 4, 1.5), ("ddp", 64, 126 / 64),
        ("exact", 1, 0), ("exact", 2, 1), ("exact", 4, 2), ("exact", 64, 6),
        ("fsdp2", 1, 0), ("fsdp2", 2, 1.5), ("fsdp2", 4, 2.25),
    ],
)  # fmt: skip
def test_bytes_are_so_many_times_the_gradients(way, processes, rounds):
    assert ideal_bytes(way, processes, 1000) == pytest.approx(rounds * 4000)


def test_fsdp2_sends_half_more_than_ddp_and_exact_the_same_on_two():
    for processes in (2, 8, 64):
        assert ideal_bytes("fsdp2", processes, 1e9) == pytest.approx(1.5 * ideal_bytes("ddp", processes, 1e9))
    assert ideal_bytes("exact", 2, 1e9) == ideal_bytes("ddp", 2, 1e9)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="ring is none of ddp, exact, fsdp2"):
        ideal_bytes("ring", 2, 1)


def test_seconds_of_exchange_are_bytes_over_bandwidth_and_latency_of_each_message():
    assert exchange_seconds(Traffic(3e9, 1000), Link("", 1e9, 1e-3)) == pytest.approx(3 + 1)


def test_each_process_computes_its_share_of_the_global_batch():
    assert compute_seconds(WORK, 1, RATE) == pytest.approx(1)
    assert compute_seconds(WORK, 8, RATE) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("way", "overlap", "expected"),
    [
        # Computing takes 1/2 s; 2 MB at 4 MB/s take 1/2 s, of which DDP hides two thirds of the computing.
        ("ddp", True, 0.5 / (0.5 + 0.5 - 1 / 3)),
        ("ddp", False, 0.5),
        ("exact", True, 0.5),
        ("exact", False, 0.5),
        ("fsdp2", True, 0.5 / 0.75),  # 3 MB take 3/4 s
        ("fsdp2", False, 0.5 / (0.5 + 0.75)),
    ],
)
def test_efficiency_of_two_processes(way, overlap, expected):
    assert efficiency(way, WORK, 2, Link("", 4e6, 0), RATE, overlap=overlap) == pytest.approx(expected)


def test_what_is_hidden_entirely_costs_nothing():
    assert efficiency("ddp", WORK, 2, Link("", 1e12, 0), RATE) == 1
    assert efficiency("exact", WORK, 2, Link("", 1e12, 0), RATE) < 1


def test_one_process_is_as_fast_as_itself():
    for way in ("ddp", "exact", "fsdp2"):
        assert efficiency(way, WORK, 1, LINKS[0], RATE) == 1


def test_state_is_sixteen_bytes_a_parameter_and_sharded_a_part_of_that_and_two_units():
    assert state_bytes("ddp", WORK, 4) == state_bytes("exact", WORK, 4) == 8e6
    assert state_bytes("fsdp2", WORK, 4) == 8e6 / 4 + 2e6 / 2 * 2


def test_the_tables_have_a_row_for_each_model_and_a_cell_for_each_column():
    lines = [line for line in paper(RATE) if "|" in line][: 2 + 2 * len(WORKS)]
    assert {line.count("|") for line in lines} == {3 + len(LINKS)}
    assert [line.split(" |")[0] for line in lines[2:]] == [f"| {work.name}" for work in WORKS for _ in (8, 64)]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel says so on Linux only")
def test_sent_bytes_are_those_of_this_process_to_the_last_one():
    from bench.scaling_worker import count_sent_bytes

    peer = """if True:
        import socket, sys
        connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        connection.sendall(b"x" * 70_000)
        left = 1_000_003
        while left:
            left -= len(connection.recv(65536))
        connection.sendall(b"y")
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        port = str(server.getsockname()[1])
        with subprocess.Popen([sys.executable, "-c", peer, port]), server.accept()[0] as connection:
            before = count_sent_bytes()
            connection.sendall(bytes(1_000_003))
            while b"y" not in connection.recv(65536):  # sent when it has all
                pass
            assert count_sent_bytes() - before == 1_000_003
