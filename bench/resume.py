"""How long a killed run takes to go on: from the start of its process to its first new step, anywhere in an epoch.

    PYTHONPATH=. python bench/resume.py --samples 1100000 --position 1000000 --repeats 5

Prints Markdown tables. Real processes, in turn: ours, resumed from a checkpoint at the first batch of an epoch and at
sample `--position`, and a script with accelerate's `skip_first_batches` (bench/resume_peer.py), with samples that are
held and, less deep, with samples that are read as a stream. Samples are 16 numbers and cost next to nothing; where
they are decoded, what is skipped in a stream is decoded too. The second table is the loader alone, without the
process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from bench.rounds import measure_rounds, ratio, spread, time_process

ROOT = Path(__file__).parents[1]
BATCH, NUMBERS = 64, 16
QUIET = ["--tracker", "none", "--preflight", "off", "--eval_every", "99 epochs", "--checkpoint_every", "99 epochs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_100_000)
    parser.add_argument("--position", type=int, default=1_000_000)
    parser.add_argument("--stream_position", type=int, default=100_000, help="of streams: accelerate reads up to it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loader_only", action="store_true")
    options = parser.parse_args()
    if not options.loader_only:
        with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
            time_scripts(Path(folder), options)
    time_loaders(options)


def time_scripts(folder: Path, options: argparse.Namespace) -> None:
    """Print seconds from the start of a process to its first new step."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    data = folder / "data"
    data.mkdir()
    make_samples(data / "train.parquet", options.samples)
    make_samples(data / "validation.parquet", 1000)  # none is cut from a stream
    ways = {}
    for streaming in (False, True):
        kind = "stream" if streaming else "held"
        flags = ["--streaming"] if streaming else []
        script = str(ROOT / "train" / "classify.py")
        ours = [sys.executable, script, "--dataset", str(data), "--model", "mlp", *QUIET, *flags]
        theirs = [sys.executable, str(ROOT / "bench" / "resume_peer.py"), "--data", str(data / "train.parquet"), *flags]
        state = folder / f"state_{kind}"
        prepare([*theirs, "--state", str(state), "--save"], environment)
        position = options.stream_position if streaming else options.position
        for batches in (1, position // BATCH):
            run = folder / f"{kind}_{batches}"
            print(f"training {batches:,} steps, {kind}", file=sys.stderr, flush=True)
            long = ["--log_every", "1000000", "--max_train_steps", str(batches)]
            prepare([*ours, *long, "--output_dir", str(run), "--run_name", "run"], environment)
            name = f"{kind} | {batches * BATCH:,}"
            ways[f"ours | {name}"] = partial(resume_ours, ours, run, batches, environment)
            skip = [*theirs, "--state", str(state), "--position", str(batches)]
            ways[f"accelerate | {name}"] = partial(resume_peer, skip, folder / "first", environment)
    seen = measure_rounds(ways, options.repeats)
    print(
        "| how | samples | sample in the epoch | seconds to the first new step | to the epoch's start | CPU seconds |"
    )
    print("|---" * 6 + "|")
    for way, values in seen.items():
        clock, cpu = zip(*values)
        start = [value for value, _ in seen[f"{way.rpartition('| ')[0]}| {BATCH}"]]
        print(f"| {way} | {spread(clock)} | {ratio(clock, start)} | {spread(cpu)} |")


def make_samples(path: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    source = np.random.default_rng(0)
    numbers = pyarrow.array(source.standard_normal(count * NUMBERS, dtype=np.float32))
    inputs = pyarrow.FixedSizeListArray.from_arrays(numbers, NUMBERS)
    table = pyarrow.table({"inputs": inputs, "label": pyarrow.array(source.integers(0, 10, count))})
    pyarrow.parquet.write_table(table, path)


def prepare(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def resume_ours(command: list[str], run: Path, step: int, environment: dict[str, str]) -> tuple[float, float]:
    """Time ours, on a copy of the run, until the line of the next step is in metrics.jsonl."""
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    metrics = copy / "run" / "metrics.jsonl"

    def done() -> bool:
        whole, _, _ = metrics.read_bytes().rpartition(b"\n")
        return any(json.loads(line)["step"] > step for line in whole.splitlines())

    flags = ["--log_every", "1", "--max_train_steps", str(step + 9), "--output_dir", str(copy), "--run_name", "run"]
    try:
        return time_process([*command, *flags], environment, done)
    finally:
        shutil.rmtree(copy)


def resume_peer(command: list[str], first: Path, environment: dict[str, str]) -> tuple[float, float]:
    first.unlink(missing_ok=True)
    return time_process([*command, "--first", str(first)], environment, first.exists)


def time_loaders(options: argparse.Namespace) -> None:
    """Print seconds to the first batch, of the loaders alone and in this process."""
    import torch
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader, TensorDataset

    from data_modules.loader import TrainingLoader
    from data_modules.sampler import BatchSampler, epoch_order
    from data_modules.splits import Arrays, DataModule, InputSpec, Split

    inputs, labels = torch.randn(options.samples, NUMBERS), torch.zeros(options.samples, dtype=torch.int64)
    split = Split(Arrays({"inputs": inputs}), labels)
    data = DataModule("bench", "", InputSpec("points", (NUMBERS,)), split, split, None, ["0", "1"])
    order = partial(epoch_order, 0, num_samples=options.samples)
    sampler = BatchSampler(order, options.samples, BATCH, 1, rank=0, num_processes=1)
    loader = TrainingLoader(data, sampler, torch.device("cpu"))
    prepared = Accelerator(cpu=True).prepare(DataLoader(TensorDataset(inputs, labels), batch_size=BATCH, shuffle=True))

    def clock(work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def ours(position: int) -> float:
        return clock(lambda: next(loader.batches(0, position)))

    def theirs(position: int) -> float:
        return clock(lambda: next(iter(skip_first_batches(prepared, position // BATCH))))

    ways = {}
    for position in (0, options.position // BATCH * BATCH):
        ways |= {
            f"ours | {position:,}": partial(ours, position),
            f"accelerate | {position:,}": partial(theirs, position),
        }
    print("\n| loader alone | sample in the epoch | seconds to the first batch |\n|---|---|---|")
    for way, values in measure_rounds(ways, options.repeats).items():
        print(f"| {way} | {spread(values, 3)} |")


if __name__ == "__main__":
    main()
