"""How much of a step is the loop: samples/s of train/classify.py, a bare loop, accelerate, Lightning and Trainer.

    python bench/loop.py --dataset FOLDER_WITH_MNIST --repeats 5

Prints a Markdown table. Each measurement is a process of its own, on MNIST from the same Parquet files, with as many
steps before the clock starts and while it runs; the ways take turns. The short steps of the mlp run for a second before
that, in which W&B goes on starting beside them. Ours is the script with all its defaults: metrics, guard, clipping,
seeds for each step, lines of metrics, W&B (offline), progress bar; only evaluations and checkpoints are put off. The
bare loop is fed from tensors in memory and does nothing but steps; once more, it keeps freed memory as ours does. A
ratio is the median of the ratios of each round. Beside wall time there is the processor's, which other work on the
machine disturbs less.
"""

import argparse
import statistics

from bench.peers.process import run_peer

# model, batch size, steps before the clock starts, steps while it runs
CASES = {"mlp": ("mlp", 128, 2000, 10000), "64": ("mnist_cnn", 64, 10, 100), "512": ("mnist_cnn", 512, 3, 15)}
PEERS = ("accelerate_example", "lightning_trainer", "hf_trainer")  # with mnist_cnn only
NAMES = {
    "ours": "ours",
    "bare": "bare loop, tensors in memory",
    "bare_keeping": "the same, keeping freed memory",
    "accelerate_example": "accelerate's vision example",
    "lightning_trainer": "Lightning",
    "hf_trainer": "Hugging Face's Trainer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a folder with MNIST's Parquet files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="mlp at 128, mnist_cnn at ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load samples, of all but bare")
    parser.add_argument("--tracker", default="wandb", help="of ours; wandb stays offline")
    options = parser.parse_args()
    print("| model | batch | way | samples/s | least to most | ours / it | ours / it, processor time |")
    print("|---|---|---|---|---|---|---|")
    for case in options.cases:
        _compare(case, options)


def _compare(case: str, options: argparse.Namespace) -> None:
    model, batch_size, warm_up, steps = CASES[case]
    ways = ("ours", "bare", "bare_keeping", *(() if model == "mlp" else PEERS))
    wall: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            [speed] = run_peer(
                way, options.threads, dataset=options.dataset, model=model, batch_size=batch_size, warm_up=warm_up,
                steps=steps, num_workers=options.num_workers, tracker=options.tracker,
            )  # fmt: skip
            wall[way].append(speed["wall"])
            processor[way].append(speed["processor"])
    for way in ways:
        ratios = [
            statistics.median(ours / other for ours, other in zip(speeds["ours"], speeds[way]))
            for speeds in (wall, processor)
        ]
        print(
            f"| {model} | {batch_size} | {NAMES[way]} | {statistics.median(wall[way]):,.0f} | "
            f"{min(wall[way]):,.0f} to {max(wall[way]):,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
