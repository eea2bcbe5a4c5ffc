"""Ask a finished run about new samples: python train/predict.py RUN FILE_OR_FOLDER ... [--top 3] [--output FILE].

Images; rows of .csv, .tsv, .parquet or .jsonl files, which need no label; lines of a .txt file, or of - for stdin.
Exit codes: 0 done; 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_modules.errors import DataError
from train.engine.cli import leave_with
from train.engine.errors import EXIT_DONE, UsageError
from train.engine.launched import find_several

if TYPE_CHECKING:  # torch takes seconds to import: --help answers without it
    import torch
    from torch import nn

    from train.engine.runtime import Runtime
    from train.evaluation.samples import Part
    from train.evaluation.trained_run import TrainedRun


def predict(request: argparse.Namespace) -> int:
    """Print a line for each sample, write what was asked for, and return the exit code.

    Raises:
        UsageError: the run cannot be used, or the output not be written.
        DataError: a sample cannot be used; nothing was written.
    """
    import torch

    from data_modules.decoding import BadRowError
    from train.evaluation.answers import build_answer, check_answers, collect, load_batches
    from train.evaluation.new_samples import read_samples
    from train.evaluation.tables import check_table_file
    from train.evaluation.trained_run import open_run, place_model, start_processes

    asked = find_several(os.environ)
    if asked is not None:
        raise UsageError(f"{asked}, but predictions are made by one process: leave the launcher out")
    if request.top < 1:
        raise UsageError(f"--top {request.top}: must be 1 or more")
    run = open_run(request.run, request.checkpoint)
    if run.kind == "stateful_lstm":
        raise UsageError(
            f"{run.path}: a stateful LSTM answers whole sequences, not single samples: python train/evaluate.py "
            f"{request.run} --dataset FILE.npy --predictions answers.csv"
        )
    if request.top != 1 and run.kind == "reconstruct":
        raise UsageError(f"--top {request.top}: is for classes, which this run has not; leave it out")
    output: Path | None = request.output
    if output is not None and run.kind == "reconstruct" and (output.exists() or not output.absolute().parent.is_dir()):
        raise UsageError(f"--output {output}: must be a new folder, in one that exists")
    if output is not None and run.kind == "classify":
        check_table_file("--output", output, (".csv", ".parquet", ".jsonl"))
        if output.absolute() in [Path(source).absolute() for source in request.sources]:
            raise UsageError(f"--output {output}: is one of the files to be read; choose another name")

    names, parts = read_samples(run, request.sources)
    runtime = start_processes(run)
    model = place_model(run, runtime)
    columns, answer = build_answer(run, model)
    try:
        answers = torch.cat([collect(answer, load_batches(run, part, runtime), runtime) for part in parts])
    except BadRowError as error:  # images are decoded when it is their turn
        raise DataError(f"{error}; replace it or leave it out") from error
    check_answers(answers)
    if run.kind == "classify":
        tell_classes(run, names, answers, request.top, output)
    else:
        tell_errors(names, columns, answers)
        if output is not None:
            write_images(run, model, runtime, parts, names, columns, answers, output)
    runtime.close()
    return EXIT_DONE


def tell_classes(run: TrainedRun, names: list[str], logits_NK: torch.Tensor, top: int, output: Path | None) -> None:
    """Print the likeliest classes of each sample, and write the probabilities of all."""
    from train.evaluation.tables import make_plain, tabulate_probabilities, write_table

    classes = run.class_names
    probabilities_NK = logits_NK.double().softmax(dim=1)
    likeliest = probabilities_NK.topk(min(top, len(classes)), dim=1)
    chosen = likeliest.indices.tolist()
    for name, numbers, shares in zip(names, chosen, likeliest.values.tolist()):
        told = "  ".join(f"{classes[number]} {share:.4f}" for number, share in zip(numbers, shares))
        print(make_plain(f"{name}: {told}"))
    if output is not None:
        predictions = [classes[numbers[0]] for numbers in chosen]
        probabilities = tabulate_probabilities(probabilities_NK.numpy(), classes)
        write_table(output, {"sample": names, "prediction": predictions, **probabilities})


def tell_errors(names: list[str], metrics: list[str], values_NM: torch.Tensor) -> None:
    """Print the metrics of each image."""
    from train.evaluation.tables import make_plain

    for name, values in zip(names, values_NM.tolist()):
        told = "  ".join(f"{metric} {value:.4g}" for metric, value in zip(metrics, values))
        print(make_plain(f"{name}: {told}"))


def write_images(
    run: TrainedRun,
    model: nn.Module,
    runtime: Runtime,
    parts: list[Part],
    names: list[str],
    metrics: list[str],
    values_NM: torch.Tensor,
    output: Path,
) -> None:
    """Write reconstructions as PNGs, and errors.csv, into a new folder, which is whole or not there.

    Raises:
        UsageError: it cannot be written.
    """
    import torch
    from PIL import Image

    from train.engine import storage
    from train.evaluation.answers import load_batches, reconstruct
    from train.evaluation.tables import write_table

    files = [f"{number:05d}_{Path(name.split(', ')[0]).stem}.png" for number, name in enumerate(names)]

    @torch.no_grad()
    def fill(folder: Path) -> None:
        left = iter(files)
        for part in parts:
            for slot in load_batches(run, part, runtime):
                images_BCHW = reconstruct(run, model, slot.batch["inputs"])[0].clamp(0, 1).mul(255).round().byte().cpu()
                for pixels in images_BCHW:
                    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / next(left))
        errors = {name: values_NM[:, place].numpy() for place, name in enumerate(metrics)}
        write_table(folder / "errors.csv", {"sample": names, "file": files, **errors}, say=False)

    try:
        storage.commit_directory(output, fill)
    except OSError as error:
        storage.remove_tree(output.with_name(f".tmp-{output.name}"))
        raise UsageError(f"--output {output}: cannot be written ({error.strerror})") from error
    print(f"wrote {output}")


def run() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("sources", metavar="FILE_OR_FOLDER", nargs="+", help="what to predict from")
    parser.add_argument("--checkpoint", metavar="WHICH", default="best", help="best (the default), latest or a step")
    parser.add_argument("--top", type=int, metavar="N", default=1, help="classes of a line")
    text = "write the probabilities of all classes: .csv, .parquet or .jsonl; of reconstructions, a new folder"
    parser.add_argument("--output", type=Path, help=text)
    leave_with(lambda: predict(parser.parse_args()), bad_input=DataError)


if __name__ == "__main__":
    run()
