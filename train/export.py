"""Export a finished run: python train/export.py RUN [--checkpoint best] [--format onnx pt2] [--push_to_hub OWNER/NAME].

Writes RUN/export/step_N/: ONNX and torch.export with the preprocessing inside, weights, and a model card.
Exit codes: 0 done; 2 bad usage or input, or answers that differ from the model's.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_modules.errors import DataError
from train.engine.cli import leave_with
from train.engine.errors import EXIT_DONE, UsageError
from train.engine.launched import find_several

if TYPE_CHECKING:  # torch takes seconds to import: --help answers without it
    from train.evaluation.formats import Format
    from train.evaluation.graph import Graph
    from train.evaluation.trained_run import TrainedRun


def export(request: argparse.Namespace) -> int:
    """Write the export, push it if that was asked for, and return the exit code.

    Raises:
        UsageError: the run cannot be exported, packages are missing, answers differ, or the hub refuses.
        DataError: the samples for the check cannot be used; nothing was written.
    """
    from train.engine import storage
    from train.evaluation.formats import check_packages
    from train.evaluation.graph import build_graph
    from train.evaluation.graph_samples import load_real_samples
    from train.evaluation.trained_run import open_run

    asked = find_several(os.environ)
    if asked is not None:
        raise UsageError(f"{asked}, but an export is made by one process: leave the launcher out")
    formats = tuple(dict.fromkeys(request.format))
    check_packages(formats)
    if request.push_to_hub is not None:
        check_repository(request.push_to_hub)
    run = open_run(request.run, request.checkpoint)
    graph = build_graph(run)
    split, samples = load_real_samples(run)

    def fill(folder: Path) -> None:
        from train.evaluation.formats import FILES, check_format, write_formats

        write_formats(graph, formats, folder)
        differences = {kind: check_format(folder / FILES[kind], samples) for kind in formats}
        write_rest(run, graph, split, differences, folder)
        for kind, difference in differences.items():
            print(f"{FILES[kind]}: largest difference from the model {difference:.2g}, split {split}")

    folder = run.path / "export" / run.checkpoint.path.name
    try:
        folder.parent.mkdir(exist_ok=True)
        storage.commit_directory(folder, fill)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        storage.remove_tree(folder.with_name(f".tmp-{folder.name}"))
    print(f"wrote {folder}")
    if request.push_to_hub is not None:
        push(folder, request.push_to_hub)
    return EXIT_DONE


def write_rest(run: TrainedRun, graph: Graph, split: str, differences: dict[Format, float], folder: Path) -> None:
    """Write weights, preprocessing, config.json and the card."""
    from safetensors.torch import save_file

    from train.evaluation.card import describe_export, write_card
    from train.evaluation.trained_run import build_model

    weights = {name: values.contiguous() for name, values in build_model(run).state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if run.preprocessing:
        write_json(folder / "preprocessing.json", run.preprocessing)
        fitted = run.preprocessing["fitted"] or {}
        if "tokenizer" in fitted:
            write_json(folder / "tokenizer.json", fitted["tokenizer"])
    config = describe_export(run, graph, split, differences)
    write_json(folder / "config.json", config)
    (folder / "README.md").write_text(write_card(run, config), encoding="utf-8")


def write_json(file: Path, values: object) -> None:
    """Write plain values."""
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def check_repository(name: str) -> None:
    """Refuse a name that no repository of the hub can have.

    Raises:
        UsageError: says what is wrong with it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {name}: {error}") from error


def push(folder: Path, repository: str) -> None:
    """Upload the export as one commit; a repository that is not there is made, private.

    Raises:
        UsageError: the hub refuses or cannot be reached; the export stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export of {folder.name}")
    except Exception as error:  # of the hub's client, of its HTTP library, of the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--push_to_hub {repository}: {reason}; the export is in {folder}. Look at the name and at `hf auth whoami`"
        ) from error
    print(f"pushed {done.commit_url}")


def run() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    text = "best (the default), latest or a step"
    parser.add_argument("--checkpoint", metavar="WHICH", default="best", help=text)
    text = "files to write; default: both"
    parser.add_argument("--format", nargs="+", choices=("onnx", "pt2"), default=["onnx", "pt2"], help=text)
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the export to the Hugging Face Hub")
    leave_with(lambda: export(parser.parse_args()), bad_input=DataError)


if __name__ == "__main__":
    run()
