"""Evaluate a finished run: python train/evaluate.py RUN [--split test] [--predictions FILE.csv].

Exit codes: 0 done; 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from functools import partial
from pathlib import Path

from data_modules.errors import DataError
from train.engine.cli import leave_with
from train.engine.errors import EXIT_DONE, UsageError
from train.engine.launched import find_several


def evaluate(request: argparse.Namespace) -> int:
    """Evaluate, write the results into the run, and return the exit code.

    Raises:
        UsageError: the run or its checkpoint cannot be used, or a file not be written.
        DataError: the data cannot be used.
    """
    from train.evaluation import results
    from train.evaluation.answers import build_answer, check_answers, collect, load_batches
    from train.evaluation.samples import load_part
    from train.evaluation.tables import check_table_file, write_table
    from train.evaluation.trained_run import build_model, open_run, place_model, start_processes

    if request.predictions is not None:
        check_table_file("--predictions", request.predictions, (".csv", ".parquet"))
    run = open_run(request.run, request.checkpoint)
    other = request.dataset not in (None, run.config.get("dataset"))
    if request.label_column is not None and not (other and run.kind == "classify"):
        raise UsageError("--label_column: is for other data of a classifier, named by --dataset; leave it out")

    def write(dataset: str, split: str, num_samples: int, result: results.Result) -> None:
        if request.predictions is not None:
            write_table(request.predictions, result.predictions)
        print(f"\nwrote {results.write_evaluation(run, dataset, split, num_samples, result, other)}")

    if run.kind == "stateful_lstm":
        asked = find_several(os.environ)
        if asked is not None:
            raise UsageError(f"{asked}, but a stateful run is evaluated by one process: leave the launcher out")
        runtime = start_processes(run)
        dataset, split, sequence = results.load_part_of_sequence(run, request.dataset, request.split)
        model = build_model(run).to(runtime.device)
        write(dataset, split, len(sequence), results.judge_sequence(run, sequence, model, runtime.device))
    else:
        runtime = start_processes(run)
        # Training may go on meanwhile, so that processes find different ones.
        run = dataclasses.replace(run, checkpoint=runtime.broadcast(run.checkpoint))
        part = runtime.main_first(lambda: load_part(run, request.dataset, request.split, request.label_column))
        model = place_model(run, runtime)
        names, answer = build_answer(run, model)
        answers = collect(answer, load_batches(run, part, runtime), runtime)
        check_answers(answers)
        judge = partial(results.judge_classes, run, part, answers)
        if run.kind == "reconstruct":
            judge = partial(results.judge_images, run, part, names, answers, model, runtime.device)
        runtime.on_main(lambda: write(part.dataset, part.name, len(part.split), judge()))
    runtime.close()
    return EXIT_DONE


def run() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    text = "best (the default), latest or a step"
    parser.add_argument("--checkpoint", metavar="WHICH", default="best", help=text)
    parser.add_argument("--dataset", metavar="OTHER", help="other data with labels; default: the data of the run")
    parser.add_argument("--split", help="default: test; where there is none, validation")
    parser.add_argument("--label_column", help="of other data; default: as in training")
    text = "write a row for each sample: .csv or .parquet"
    parser.add_argument("--predictions", metavar="FILE", type=Path, help=text)
    leave_with(lambda: evaluate(parser.parse_args()), bad_input=DataError)


if __name__ == "__main__":
    run()
