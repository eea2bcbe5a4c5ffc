"""What every peer is asked for and what it answers: lines of JSON on stdout, with seconds and accuracies."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


class Clock:
    """Times the steps of a peer between a warm-up and an end, or the way to an accuracy. Either ends the process."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Take the options of `parse`."""
        self._options = options
        self._steps = 0
        self._start = (0.0, 0.0)

    def step(self) -> None:
        """Count an optimizer step; to be called after each."""
        self._steps += 1
        if self._steps == self._options.warm_up:
            self._start = time.perf_counter(), time.process_time()
        if self._steps == self._options.warm_up + self._options.steps:
            now = time.perf_counter(), time.process_time()
            samples = self._options.steps * self._options.batch_size
            wall, processor = (samples / (end - begin) for begin, end in zip(self._start, now))
            self._say(wall=wall, processor=processor)
            leave()

    def evaluated(self, samples: int, accuracy: float) -> None:
        """Take the test accuracy after so many samples of training."""
        self._say(time=time.time(), processor=time.process_time(), samples=samples, accuracy=accuracy)
        if accuracy >= self._options.until:
            leave()

    @staticmethod
    def _say(**values: float) -> None:
        print(json.dumps(values), flush=True)


def leave() -> None:
    """End the process at once: nothing that a library does afterwards is measured."""
    sys.stderr.flush()
    os._exit(0)


def parse() -> argparse.Namespace:
    """Return what a peer is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", required=True, help="a folder with MNIST's Parquet files, or for ours a hub id")
    parser.add_argument("--folder", required=True, help="for whatever is written")
    parser.add_argument("--model", default="mnist_cnn")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm_up", type=int, default=0, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=0, help="steps to time; 0: train to an accuracy")
    parser.add_argument("--until", type=float, default=2.0, help="test accuracy that ends the job")
    parser.add_argument("--eval_every", type=int, default=7680, help="samples of training between two evaluations")
    parser.add_argument("--epochs", type=int, default=12, help="most passes over the training split")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load samples")
    parser.add_argument("--tracker", default="none", help="of ours: none or wandb")
    return parser.parse_args()
