"""What several processes cost and bring: bytes sent, samples per second, agreeing on stopping.

    PYTHONPATH=. python bench/scaling.py --processes 2 --rounds 7
    PYTHONPATH=. python bench/scaling.py --only bytes --processes 2 4
    PYTHONPATH=. python bench/scaling.py --paper

Prints Markdown tables. The processes run the training loop on a batch of noise that stays in memory, one on each GPU,
or on CPUs with one thread each, beside a single process that has one thread or all of theirs. Blocks of steps are
timed in turn, over all that is compared; ratios are medians of the ratios of each round. Bytes are what the kernel says
of a process's TCP connections (Linux, CPUs): what NCCL sends is not seen there. --paper measures nothing and prints
what bench/scaling_formulas.py expects.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.scaling_formulas import WAYS, ideal_bytes, paper

WORKER = Path(__file__).with_name("scaling_worker.py")
NAMES = {"ddp": "DDP", "exact": "exact reduction", "fsdp2": "FSDP2", "alone": "no exchange"}
PARTS = ("bytes", "speed", "agree")
PEAK, SHARE = 312e12, 0.4  # of NVIDIA's A100 in bf16, from its data sheet; the share is assumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--models", nargs="+", default=["mlp", "mnist_cnn", "fast_cnn", "simple_lstm"])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block", type=float, default=0.5, help="seconds of a timed block")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="mixed precision")
    parser.add_argument("--paper", action="store_true", help="print what the formulas say, and measure nothing")
    parser.add_argument("--peak", type=float, default=PEAK, help="of --paper: operations per second of a process")
    parser.add_argument("--share", type=float, default=SHARE, help="of --paper: share of the peak that is reached")
    options = parser.parse_args()
    if options.paper:
        print("\n".join(paper(options.peak * options.share)))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    os.environ["ACCELERATE_MIXED_PRECISION"] = options.precision  # the processes hear of it as from a launcher
    precision = "float32" if options.precision == "no" else options.precision
    print(f"torch {version('torch')}, {machine}, {precision}, n = {options.rounds}")
    for processes in options.processes:
        with start_group(processes, options.block) as group, start_group(1, options.block) as single:
            if "bytes" in options.only:
                print_bytes(group, options)
            if "speed" in options.only:
                print_speed(group, single, options)
            if "agree" in options.only:
                print_agreement(group, options)


class Group:
    """Processes that train together when they are asked to."""

    def __init__(self, processes: int, block: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = processes
        self.workers = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            kept = place if processes > 1 else {"OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{name: str(value) for name, value in kept.items()}}
            command = [sys.executable, str(WORKER), str(block)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE if rank == 0 else subprocess.DEVNULL}
            self.workers.append(subprocess.Popen(command, env=environment, text=True, **pipes))

    def ask(self, model: str, way: str, batch: int, *, threads: int = 1, agree: str = "paced") -> dict[str, Any] | None:
        """Return what a block of steps gave; None if the model cannot be trained this way."""
        task = {"model": model, "way": way, "batch": batch, "threads": threads, "agree": agree}
        for worker in self.workers:
            worker.stdin.write(json.dumps(task) + "\n")
            worker.stdin.flush()
        line = self.workers[0].stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended at {task}; what it said is above")
        answer = json.loads(line)
        return None if "refused" in answer else answer


@contextmanager
def start_group(processes: int, block: float) -> Iterator[Group]:
    """Start processes; they end with the block."""
    group = Group(processes, block)
    try:
        yield group
        for worker in group.workers:
            worker.stdin.close()
        for worker in group.workers:
            worker.wait(60)
    finally:
        for worker in group.workers:
            worker.kill()
            worker.wait()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def divide(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [one / other for one, other in zip(above, below)]


def print_bytes(group: Group, options: argparse.Namespace) -> None:
    """Print what a process sends in a step, beside what the best way of sending would."""
    number = group.processes
    print(f"\nBytes that one of {number} processes sends in an optimizer step\n")
    print("| model | parameters | way | measured | ideal | measured / ideal |\n|---|---|---|---|---|---|")
    for model in options.models:
        for way in WAYS:
            answer = None if way == "exact" and number & (number - 1) else group.ask(model, way, options.batch)
            if answer is None:
                print(f"| {model} | | {NAMES[way]} | refused | | |")
                continue
            ideal = ideal_bytes(way, number, answer["parameters"])
            sent, ratio = "not seen", ""
            if answer["bytes"] is not None:
                sent, ratio = f"{answer['bytes']:,.0f}", f"{answer['bytes'] / ideal:.2f}"
            print(
                f"| {model} | {answer['parameters']:,} | {NAMES[way]} | {sent} | {ideal:,.0f} | {ratio} |", flush=True
            )


def print_speed(group: Group, single: Group, options: argparse.Namespace) -> None:
    """Print samples per second of each way, and their ratios to a single process and to no exchange at all."""
    number, batch = group.processes, options.batch
    print(f"\n1 to {number} processes. Same batch: {batch} for all of them. Same share: {batch} for each.\n")
    print(
        f"| model | way | samples/s, same batch | to 1 process of {number} threads | to {number} times 1 process "
        f"| to no exchange | same share: to {number} times 1 process | to no exchange |"
    )
    print("|---" * 8 + "|")
    hidden = []
    for model in options.models:
        seen = time_rounds(group, single, model, options)
        one, threads = seen["one"], seen["threads"]
        several = [number * speed for speed in one]
        print(f"| {model} | 1 process, 1 thread | {spread(one, 0)} | | | | | |")
        print(f"| {model} | 1 process, {number} threads | {spread(threads, 0)} | | | | | |")
        for way in ("alone", *WAYS):
            if not seen[way, batch]:
                print(f"| {model} | {NAMES[way]} | refused | | | | | |")
                continue
            strong, weak = seen[way, batch], seen[way, batch * number]
            cells = [spread(strong, 0), spread(divide(strong, threads)), spread(divide(strong, several))]
            cells += [spread(divide(strong, seen["alone", batch])), spread(divide(weak, several))]
            cells += [spread(divide(weak, seen["alone", batch * number]))]
            print(f"| {model} | {NAMES[way]} | {' | '.join(cells)} |", flush=True)
        steps = [batch / speed * 1e3 for speed in seen["ddp", batch]]
        exposed = [step - batch / speed * 1e3 for step, speed in zip(steps, seen["alone", batch])]
        hidden.append(f"| {model} | {spread(steps, 1)} | {spread(exposed, 1)} | {spread(seen['exchange'], 1)} |")
    print("\n| model | ms of a DDP step | more than without exchange | an all-reduce alone |\n|---|---|---|---|")
    print("\n".join(hidden))


def time_rounds(group: Group, single: Group, model: str, options: argparse.Namespace) -> dict[Any, list[float]]:
    """Return samples per second of each round: of "one" and "threads", a single process, and of each (way, batch).

    And under "exchange" the milliseconds of an all-reduce alone. Round 0, which builds and warms up, is dropped.
    """
    number, batch = group.processes, options.batch
    ways = ["alone", *(way for way in WAYS if way != "exact" or number & (number - 1) == 0)]
    tasks: dict[Any, Callable[[], dict[str, Any] | None]] = {
        "one": partial(single.ask, model, "ddp", batch),
        "threads": partial(single.ask, model, "ddp", batch, threads=number),
        "exchange": partial(group.ask, model, "exchange", batch, agree="no"),
    }
    tasks |= {(way, size): partial(group.ask, model, way, size) for way in ways for size in (batch, batch * number)}
    seen: dict[Any, list[float]] = defaultdict(list)
    for position in range(options.rounds + 1):
        for key in random.Random(position).sample(list(tasks), len(tasks)):
            answer = tasks[key]()
            if answer is not None and position:
                samples = key[1] if isinstance(key, tuple) else batch
                seen[key].append(1e3 * answer["seconds"] if key == "exchange" else samples / answer["seconds"])
    return seen


def print_agreement(group: Group, options: argparse.Namespace) -> None:
    """Print what a step takes without agreeing on stopping, as it is in training, and with it at each step."""
    rounds = 4 * options.rounds
    print(f"\nAgreeing on stopping: {group.processes} processes, DDP, batch {options.batch}, n = {rounds}\n")
    print("| model | agree | ms of a step | ratio to no, median | middle half | ms of CPU time | ratio | middle half |")
    print("|---|---|---|---|---|---|---|---|")
    ways = ["no", "paced", "each step"]
    for model in options.models:
        seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for position in range(rounds + 1):
            for way in random.Random(position).sample(ways, len(ways)):
                answer = group.ask(model, "ddp", options.batch, agree=way)
                if position:
                    seen[way].append((1e3 * answer["seconds"], 1e3 * answer["computing"]))
        for way in ways:
            cells = []
            for mine, without in zip(zip(*seen[way]), zip(*seen["no"])):
                low, middle, high = statistics.quantiles(divide(mine, without), n=4)
                cells += [f"{statistics.median(mine):.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
            print(f"| {model} | {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
