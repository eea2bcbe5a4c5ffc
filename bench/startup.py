"""How long a training script takes to answer --help, and to its first optimizer step, from the start of the process.

    PYTHONPATH=. python bench/startup.py --repeats 5

Prints Markdown tables. Real processes, one after another, in turn: ours on the digits, the others, of
bench/startup_peers.py, on as much noise, which costs them no loading. Ours is timed as it comes, with W&B offline and
the quick checks, and without both, as the others are. A process is killed once its first step is seen. CPU time is
steadier than the clock where other work runs beside. What is missing is named and left out.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.rounds import measure_rounds, ratio, spread, time_process

ROOT = Path(__file__).parents[1]
OURS = [sys.executable, str(ROOT / "train" / "classify.py")]
NAMES = {"plain": "plain torch", "accelerate": "accelerate", "lightning": "Lightning", "trainer": "HF Trainer"}
NEEDS = {"lightning": "lightning", "trainer": "transformers"}
OUR_FLAGS = {"ours": ["--tracker", "none", "--preflight", "off"], "ours, W&B and quick checks": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    peers = [name for name in NAMES if importlib.util.find_spec(NEEDS.get(name, name if name != "plain" else "torch"))]
    for name in NAMES.keys() - set(peers):
        print(f"{NAMES[name]} is missing: pip install {NEEDS[name]}\n")
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    helps = {"ours": [*OURS, "--help"]} | {NAMES[name]: [*peer(name), "--help"] for name in peers}
    timed = {way: partial(time_process, command, environment) for way, command in helps.items()}
    print_table("--help", measure_rounds(timed, options.repeats))
    steps = {way: partial(first_step, flags, environment) for way, flags in OUR_FLAGS.items()}
    steps |= {NAMES[name]: partial(peer_step, name, environment) for name in peers}
    print_table("process start to first step", measure_rounds(steps, options.repeats))


def peer(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "startup_peers.py"), name]


def first_step(flags: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Time ours until the line of step 1 is in metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        metrics = Path(folder, "run", "metrics.jsonl")
        command = [*OURS, "--log_every", "1", "--output_dir", folder, "--run_name", "run", *flags]
        return time_process(command, environment, lambda: metrics.exists() and metrics.stat().st_size > 0)


def peer_step(name: str, environment: dict[str, str]) -> tuple[float, float]:
    """Time a peer until it has written its file."""
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        first = Path(folder, "first")
        command = [*peer(name), "--first", str(first)]
        if name == "trainer":
            command += ["--output_dir", folder, "--report_to", "none", "--disable_tqdm", "true"]
        return time_process(command, environment, first.exists)


def print_table(what: str, seen: dict[str, list[tuple[float, float]]]) -> None:
    """Print seconds on the clock and of CPU time, and how they compare with ours."""
    print(f"\n| {what} | seconds on the clock | ratio to ours | CPU seconds | ratio to ours |\n|---|---|---|---|---|")
    ours_clock, ours_cpu = zip(*seen["ours"])
    for way, values in seen.items():
        clock, cpu = zip(*values)
        print(f"| {way} | {spread(clock)} | {ratio(clock, ours_clock)} | {spread(cpu)} | {ratio(cpu, ours_cpu)} |")


if __name__ == "__main__":
    main()
