"""How fast the engines of the stateful LSTM are, in one run and on one thread, and how much memory an epoch takes.

    python bench/stateful.py --rounds 5 --updates 200

Prints Markdown tables. All ways train on the same sinusoids; they run in turn, and a ratio is the median of the ratios
of each round. "By hand" is the loop as one would write it: nn.LSTM and nn.Linear, torch.optim.Adam as it is, a mean
squared error, clip_grad_norm_, loss.item(). The floor is a pass over the weights and both moments with NumPy, each read
and written once. A table is printed for the GPU where there is one.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import psutil
import torch
from torch import nn

from data_modules.frequency import make_sinusoids
from models.frequency_lstm import FrequencyLSTM
from train.stateful.contract import SUMS, Course
from train.stateful.eager import EagerEngine
from train.stateful.fused import FusedEngine

SIZES = (16, 32, 64, 128, 256)
FIRST = 10_000  # the sinusoids' second column of choice has taken over from the first
MAX_GRAD_NORM = 1.0
Advance = Callable[[int], None]  # takes so many updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=200, help="of a slow way in a round; the fast ones take more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, numba {numba.__version__}, NumPy {np.__version__}, float32, n = {options.rounds}"
    )
    started = time.perf_counter()
    _fused(8, 1, "cpu")(1)
    print(f"first call of the fused engine: {time.perf_counter() - started:.1f} s\n")

    print("| H | window | way | median us/update | least to most | by hand / it | it / floor |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        _compare(size, 1, options.rounds, options.updates)
    _compare(64, 100, options.rounds, max(10, options.updates // 5))
    _print_memory()
    if torch.cuda.is_available():
        _compare_on_gpu(options.rounds, options.updates)
    else:
        print("\nno GPU here")


def _make_course(size: int, window: int, device: str) -> Course:
    torch.manual_seed(0)
    model = FrequencyLSTM(5, size).to(device)
    samples = make_sinusoids("train")
    optimizer = torch.optim.Adam(model.parameters())
    return Course(model, optimizer, samples.inputs.to(device), samples.targets.to(device), window, MAX_GRAD_NORM)


def _by_hand(size: int, window: int, device: str) -> Advance:
    course = _make_course(size, window, device)
    lstm, head, optimizer = course.model.lstm, course.model.head, course.optimizer
    parameters, mean_squared_error = list(course.model.parameters()), nn.MSELoss()
    state, sample = None, 0

    def advance(updates: int) -> None:
        nonlocal state, sample
        for _ in range(updates):
            now = slice(FIRST + sample, FIRST + sample + window)
            sample = (sample + window) % FIRST
            hidden, state = lstm(course.inputs[None, now], state)
            state = tuple(part.detach() for part in state)
            loss = mean_squared_error(head(hidden), course.targets[None, now])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            loss.item()

    return advance


def _engine(kind: Any, size: int, window: int, device: str) -> Advance:
    course = _make_course(size, window, device)
    engine = kind(course)
    state, sample = None, 0
    sums = torch.zeros(SUMS, dtype=torch.float64)

    def advance(updates: int) -> None:
        nonlocal state, sample
        most = engine.most_samples // window
        while updates:
            taken = min(updates, most, (FIRST - sample) // window)
            start = FIRST + sample
            state = engine.advance(start, start + taken * window, state, [1e-3] * taken, sums)
            sample = (sample + taken * window) % FIRST
            updates -= taken

    return advance


def _eager(size: int, window: int, device: str) -> Advance:
    return _engine(EagerEngine, size, window, device)


def _fused(size: int, window: int, device: str) -> Advance:
    return _engine(FusedEngine, size, window, device)


def _floor(size: int) -> Advance:
    number = sum(parameter.numel() for parameter in FrequencyLSTM(5, size).parameters())
    arrays = [np.ones(number, dtype=np.float32) for _ in range(3)]
    one = np.float32(1)

    def advance(passes: int) -> None:
        for _ in range(passes):
            for array in arrays:
                np.multiply(array, one, out=array)

    return advance


def _time(ways: dict[str, tuple[Advance, int]], rounds: int) -> dict[str, list[float]]:
    """Return microseconds an update for each way and round; a round takes all ways in turn."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for advance, updates in ways.values():
        advance(max(1, updates // 4))
    for _ in range(rounds):
        for name, (advance, updates) in ways.items():
            started = time.perf_counter()
            advance(updates)
            seen[name].append((time.perf_counter() - started) / updates * 1e6)
    return seen


def _print_rows(name: str, seen: dict[str, list[float]]) -> None:
    for way, times in seen.items():
        by_hand = statistics.median(slow / fast for slow, fast in zip(seen["by hand"], times))
        floor = (
            statistics.median(mine / least for mine, least in zip(times, seen["floor"])) if "floor" in seen else None
        )
        print(
            f"| {name} | {way} | {statistics.median(times):,.1f} | {min(times):,.1f} to {max(times):,.1f} | "
            f"{by_hand:.1f} | {'' if floor is None else f'{floor:.1f}'} |",
            flush=True,
        )


def _compare(size: int, window: int, rounds: int, updates: int) -> None:
    ways = {
        "by hand": (_by_hand(size, window, "cpu"), updates),
        "eager": (_eager(size, window, "cpu"), updates),
        "fused": (_fused(size, window, "cpu"), 10 * updates),
        "floor": (_floor(size), 10 * updates),
    }
    _print_rows(f"{size} | {window}", _time(ways, rounds))


def _compare_on_gpu(rounds: int, updates: int) -> None:
    from train.stateful.cuda_graph import CudaGraphEngine

    print(f"\n{torch.cuda.get_device_name()}\n")
    print("| H | window | way | median us/update | least to most | by hand / it | |")
    print("|---|---|---|---|---|---|---|")
    for size, window in ((64, 1), (256, 1), (64, 100)):
        ways = {
            "by hand": (_by_hand(size, window, "cuda"), updates),
            "eager": (_eager(size, window, "cuda"), updates),
            "CUDA graph": (_engine(CudaGraphEngine, size, window, "cuda"), updates),
            "fused, on the CPU": (_fused(size, window, "cpu"), updates),
        }
        _print_rows(f"{size} | {window}", _time(ways, rounds))


def _print_memory() -> None:
    """Print by how much the process grows: over an epoch of the fused engine, and a twentieth of one of the eager."""
    process = psutil.Process(os.getpid())
    print("\n| H | window | way | updates | memory before | growth at most |")
    print("|---|---|---|---|---|---|")
    for way, build, updates in (("fused", _fused, 40_000), ("eager", _eager, 2_000)):
        advance = build(64, 1, "cpu")
        advance(1_000)
        gc.collect()
        before = most = process.memory_info().rss
        for _ in range(20):
            advance(updates // 20)
            most = max(most, process.memory_info().rss)
        print(f"| 64 | 1 | {way} | {updates:,} | {before / 2**20:,.1f} MiB | {(most - before) / 2**20:,.2f} MiB |")


if __name__ == "__main__":
    main()
