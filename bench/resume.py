"""How long the first batch after a resume takes, at the start and deep inside an epoch, against skipping batches.

    python bench/resume.py --samples 1000000 --repeats 5

Prints a Markdown table. accelerate's `skip_first_batches` walks through all that it skips (accelerate 1.15).
"""

import argparse
import statistics
import time
from functools import partial

import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, TensorDataset

from data_modules.loader import TrainingLoader
from data_modules.sampler import BatchSampler, epoch_order
from data_modules.splits import Arrays, DataModule, InputSpec, Split

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    inputs, labels = torch.randn(options.samples, 16), torch.zeros(options.samples, dtype=torch.int64)
    split = Split(Arrays({"inputs": inputs}), labels)
    data = DataModule("bench", "", InputSpec("points", (16,)), split, split, None, ["0", "1"])
    order = partial(epoch_order, 0, num_samples=options.samples)
    sampler = BatchSampler(order, options.samples, BATCH, 1, rank=0, num_processes=1)
    loader = TrainingLoader(data, sampler, torch.device("cpu"))
    prepared = Accelerator(cpu=True).prepare(DataLoader(TensorDataset(inputs, labels), batch_size=BATCH, shuffle=True))
    positions = [options.samples * part // 100 // BATCH * BATCH for part in (0, 50, 99)]
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.repeats):
        for position in positions:
            start = time.perf_counter()
            next(loader.batches(0, position))
            seconds.setdefault(("ours", position), []).append(time.perf_counter() - start)
            start = time.perf_counter()
            next(iter(skip_first_batches(prepared, position // BATCH)))
            seconds.setdefault(("skip_first_batches", position), []).append(time.perf_counter() - start)
    print("| how | sample in the epoch | median seconds to the first batch | least to most |")
    print("|---|---|---|---|")
    for (how, position), values in sorted(seconds.items()):
        print(
            f"| {how} | {position:,} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} |",
        )


if __name__ == "__main__":
    main()
