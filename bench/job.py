"""The whole job: seconds from the start of the process to an accuracy on MNIST's test split, ours and the peers'.

    python bench/job.py --dataset FOLDER_WITH_MNIST --repeats 5 --at_once 2 --results FILE

Prints Markdown tables. All read the same Parquet files and are evaluated on the test split after every 7,680 samples
of training; the seconds include these evaluations, all imports and all reading. Ours is train/recipes/mnist.yaml,
once with an empty cache of decoded images and once with a full one. The peers train conv32 - conv64 - pool - dropout
- 128 - dropout - 10 with Adam at 1e-3 and batch 64, as one does. The second table is our recipe as it is: it looks at
the test split once, at its end. A repeat is a seed; the ways take turns within it. A peer takes minutes to 98.45 %
and several times as long to 99 %: --far says how many of the seeds go on to that. With --results each run is kept in
that file as it ends, and what the file has is not run again.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.peers.process import run_peer

GOALS = (0.9845, 0.99)
SAMPLES_BETWEEN = 7680
WAYS = {  # module, batch size, name
    "cold": ("ours", 128, "ours, nothing decoded"),
    "warm": ("ours", 128, "ours, images in the cache"),
    "lab": ("lab", 64, "a lab's script, torch only"),
    "accelerate": ("accelerate_example", 64, "accelerate's vision example"),
    "lightning": ("lightning_trainer", 64, "Lightning"),
    "trainer": ("hf_trainer", 64, "Hugging Face's Trainer"),
    "recipe": ("ours", 128, "ours, as the recipe is"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a folder with MNIST's Parquet files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--far", type=int, default=5, help="seeds that go on to the higher accuracy")
    parser.add_argument("--at_once", type=int, default=1, help="processes that run side by side")
    parser.add_argument("--results", type=Path, help="file that keeps each run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runs = []
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.results and options.results.exists():
        runs = [json.loads(line) for line in options.results.read_text().splitlines()]
    done = {(run["way"], run["seed"]) for run in runs if run["until"] >= _goal(run["seed"], options)}
    missing = [(way, seed) for seed in range(options.repeats) for way in options.ways if (way, seed) not in done]
    if any(way in ("warm", "recipe") for way, _ in missing):
        _run("recipe", 0, options)  # fills the cache; not counted
    with ThreadPoolExecutor(options.at_once) as pool:
        for run in pool.map(lambda each: _run(*each, options), missing):
            runs.append(run)
            if options.results:
                with open(options.results, "a") as file:
                    file.write(json.dumps(run) + "\n")
    for goal in GOALS:
        _print_goal(goal, runs)
    _print_recipe([run for run in runs if run["way"] == "recipe"])


def _goal(seed: int, options: argparse.Namespace) -> float:
    return GOALS[seed < options.far]


def _run(way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a peer says after each evaluation, with seconds from the start of its process."""
    peer, batch_size, _ = WAYS[way]
    to_the_end, until = way == "recipe", _goal(seed, options)
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as empty:
        started = time.time()
        lines = run_peer(
            peer, options.threads, empty if way == "cold" else None, dataset=options.dataset, batch_size=batch_size,
            seed=seed, eval_every=0 if to_the_end else SAMPLES_BETWEEN, until=0 if to_the_end else until,
        )  # fmt: skip
        lines = [{**line, "seconds": line["time"] - started} for line in lines]
    return {"way": way, "seed": seed, "until": until, "lines": lines}


def _first(run: dict[str, Any], goal: float) -> dict[str, float] | None:
    return next((line for line in run["lines"] if line["accuracy"] >= goal), None)


def _print_goal(goal: float, runs: list[dict[str, Any]]) -> None:
    tried = [run for run in runs if run["way"] != "recipe" and run["until"] >= goal]
    reached = {(run["way"], run["seed"]): _first(run, goal) for run in tried}
    print(f"\nTo {goal:.2%} on the test split:\n")
    print("| way | n | seconds | least to most | samples seen | it / ours, cold | it / ours, warm | same, processor |")
    print("|---|---|---|---|---|---|---|---|")
    for way, (_, _, name) in WAYS.items():
        mine = {seed: line for (other, seed), line in reached.items() if other == way and line is not None}
        number = sum(other == way for other, _ in reached)
        if not mine:
            continue
        seconds = [line["seconds"] for line in mine.values()]
        samples = statistics.median(line["samples"] for line in mine.values())
        ratios = [_ratio(mine, reached, "cold", "seconds"), _ratio(mine, reached, "warm", "seconds")]
        ratios.append(_ratio(mine, reached, "warm", "processor"))
        print(
            f"| {name} | {len(mine)} of {number} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to "
            f"{max(seconds):.1f} | {samples:,.0f} | {' | '.join(ratios)} |"
        )


def _ratio(mine: dict[int, Any], reached: dict[tuple[str, int], Any], ours: str, what: str) -> str:
    """Return the median ratio to ours over the seeds that both have, or a dash."""
    pairs = [(line[what], reached[ours, seed][what]) for seed, line in mine.items() if reached.get((ours, seed))]
    return f"{statistics.median(its / ours for its, ours in pairs):.2f}" if pairs else "-"


def _print_recipe(runs: list[dict[str, Any]]) -> None:
    ends = [run["lines"][-1] for run in runs]
    if ends:
        seconds, accuracies = [end["seconds"] for end in ends], [end["accuracy"] for end in ends]
        print(
            f"\n{WAYS['recipe'][2]}: n = {len(ends)}, median {statistics.median(seconds):.1f} s ({min(seconds):.1f} to "
            f"{max(seconds):.1f}), test accuracy {statistics.mean(accuracies):.2%} ({min(accuracies):.2%} to "
            f"{max(accuracies):.2%})"
        )


if __name__ == "__main__":
    main()
