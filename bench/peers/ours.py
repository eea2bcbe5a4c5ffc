"""train/classify.py as its command line starts it; told apart by what it calls after each step and line of metrics."""

import sys
from pathlib import Path
from typing import Any

from bench.peers.clock import Clock, parse

ROOT = Path(__file__).resolve().parents[2]
NEVER = str(10**9)


def main() -> None:
    options = parse()
    clock = Clock(options)
    arguments = ["--dataset", options.dataset, "--output_dir", options.folder, "--run_name", "run"]
    arguments += ["--batch_size", str(options.batch_size), "--num_workers", str(options.num_workers)]
    arguments += ["--tracker", options.tracker, "--seed", str(options.seed)]
    if options.steps:
        arguments += ["--model", options.model, "--num_train_epochs", NEVER]
        arguments += ["--eval_every", NEVER, "--checkpoint_every", NEVER]
        _watch_steps(clock)
    else:
        arguments += ["--config", str(ROOT / "train" / "recipes" / "mnist.yaml")]
        if options.eval_every:
            arguments += ["--validation_split", "test", "--eval_every", str(options.eval_every // options.batch_size)]
        _watch_accuracy(clock, options)
    sys.argv[1:] = arguments
    from train.classify import run

    run()


def _watch_steps(clock: Clock) -> None:
    from train.engine.heartbeat import Heartbeat

    beat = Heartbeat.beat

    def beat_and_count(self: Heartbeat, step: int) -> None:
        beat(self, step)
        clock.step()

    Heartbeat.beat = beat_and_count  # type: ignore[method-assign]


def _watch_accuracy(clock: Clock, options: Any) -> None:
    """Tell each accuracy on the test split: of evaluations, if they are on it, else of the best weights at the end."""
    from train.engine.tracking import Tracker

    name, key = ("log", "val/accuracy") if options.eval_every else ("summarize", "test/accuracy")
    inner = getattr(Tracker, name)

    def tell(self: Tracker, step: int, values: dict[str, float]) -> None:
        inner(self, step, values)
        if key in values:
            clock.evaluated(step * options.batch_size, values[key])

    setattr(Tracker, name, tell)


if __name__ == "__main__":
    main()
