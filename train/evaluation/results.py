"""What an evaluation leaves: numbers, pictures and a table of predictions; of each kind of run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_modules.errors import DataError
from data_modules.frequency import Sequence, load_sequence, make_sinusoids
from train.engine import storage
from train.engine.errors import UsageError
from train.engine.plots import draw_images
from train.evaluation import judging
from train.evaluation.answers import reconstruct
from train.evaluation.pictures import draw_confusion_matrix, draw_reliability
from train.evaluation.samples import Part, choose_split
from train.evaluation.tables import tabulate_probabilities, to_markdown
from train.evaluation.trained_run import TrainedRun

WORST = 8  # images that are shown
BLOCK = 500  # samples of a sequence that are drawn together
FILES = {"train": "data", "validation": "validation_data", "test": "test_data"}  # settings of a stateful run


@dataclass(frozen=True)
class Result:
    """Plain values, what draws PNGs into a folder, and the columns of a table with a row for each sample."""

    numbers: dict[str, Any]
    draw: Callable[[Path], None]
    predictions: dict[str, Any]


def judge_classes(run: TrainedRun, part: Part, logits_NK: torch.Tensor) -> Result:
    """Judge a classifier by its logits."""
    names, labels = run.class_names, part.split.labels
    numbers = judging.judge_classifier(logits_NK.numpy(), labels.numpy(), names)

    def draw(folder: Path) -> None:
        draw_confusion_matrix(numbers["confusion_matrix"], names, folder / "confusion_matrix.png")
        draw_reliability(numbers["calibration"], folder / "reliability.png")

    predictions = {
        "index": part.numbers.numpy(),
        "label": [names[number] for number in labels.tolist()],
        "prediction": [names[number] for number in logits_NK.argmax(dim=1).tolist()],
        **tabulate_probabilities(logits_NK.double().softmax(dim=1).numpy(), names),
    }
    return Result(numbers, draw, predictions)


def judge_images(
    run: TrainedRun, part: Part, metrics: list[str], values_NM: torch.Tensor, model: nn.Module, device: torch.device
) -> Result:
    """Judge an autoencoder by the metrics of each image."""

    @torch.no_grad()
    def draw(folder: Path) -> None:
        worst = values_NM[:, metrics.index("loss")].topk(min(WORST, len(values_NM)))
        images = part.data.prepare(part.split.gather(worst.indices), device)["inputs"]
        answers = reconstruct(run, model, images)[0]
        rows = (("original", images), ("reconstruction", answers), ("error", (images - answers).abs()))
        numbers = part.numbers[worst.indices].tolist()
        captions = [f"{number}  loss {loss:.3g}" for number, loss in zip(numbers, worst.values.tolist())]
        draw_images(folder / "worst.png", [(title, shown.cpu()) for title, shown in rows], captions)

    predictions = {"index": part.numbers.numpy()}
    predictions |= {name: values_NM[:, place].numpy() for place, name in enumerate(metrics)}
    return Result({"metrics": judging.judge_means(metrics, values_NM.numpy())}, draw, predictions)


def load_part_of_sequence(run: TrainedRun, dataset: str | None, split: str | None) -> tuple[str, str, Sequence]:
    """Return what a stateful run is asked about: the name of the data, of the split, and its samples.

    Raises:
        DataError: there is no such file or split, it has other columns than in training, or has changed since.
    """
    if dataset is not None:
        columns = run.checkpoint.record["data"]["splits"]["train"]["columns"]
        sequence = load_sequence(dataset)
        if sequence.inputs.shape[1] != columns:
            raise DataError(
                f"{dataset}: has {sequence.inputs.shape[1]} input columns, the run was trained on {columns}"
            )
        return dataset, choose_split(dataset, {"all": None}, split), sequence
    source = run.config["data"]
    there = {name: run.config[setting] for name, setting in FILES.items() if source is None or run.config[setting]}
    name = choose_split(source or "sinusoids", there, split)
    sequence = make_sinusoids(name) if source is None else load_sequence(there[name])
    trained = run.checkpoint.record["data"]["splits"].get(name)
    if trained is not None and trained["fingerprint"] != sequence.fingerprint():
        raise DataError(f"{there[name]}: has changed since the run was trained; give other data with --dataset")
    return source or "sinusoids", name, sequence


def judge_sequence(run: TrainedRun, sequence: Sequence, model: nn.Module, device: torch.device) -> Result:
    """Judge an LSTM that carries its state through a sequence; weights are frozen, the state begins at zero."""
    from models.frequency_lstm import FrequencyLSTM
    from train.stateful import report

    assert isinstance(model, FrequencyLSTM)
    answers_N1 = report.predict(model, sequence.inputs.to(device))
    errors_N1 = (answers_N1.double() - sequence.targets.double()).square().numpy()
    metrics = judging.judge_means(["loss"], errors_N1, BLOCK)
    for name, value in report.score(answers_N1, sequence.targets, sequence.groups).items():
        metrics.setdefault(name, {"value": value, "interval": None})
    predictions = {
        "index": torch.arange(len(sequence)).numpy(),
        "target": sequence.targets[:, 0].numpy(),
        "prediction": answers_N1[:, 0].numpy(),
    }

    def draw(folder: Path) -> None:
        report.draw_answers(folder / "answers.png", answers_N1, sequence.targets, sequence.groups, run.path.name)

    return Result({"metrics": metrics}, draw, predictions)


def write_evaluation(run: TrainedRun, dataset: str, split: str, num_samples: int, result: Result, other: bool) -> Path:
    """Print the tables, and put them with numbers and pictures into the run's folder, all of it or nothing.

    An evaluation of the same split at the same step takes the place of the one before.

    Returns:
        RUN/evaluation/SPLIT-step_N, of other data NAME-SPLIT-step_N-DIGEST, where the digest is of the path.

    Raises:
        UsageError: the folder cannot be written.
    """
    report = {
        "run": run.path.resolve().name,
        "step": run.checkpoint.step,
        "weights": run.weights,
        "dataset": dataset,
        "split": split,
        "samples": num_samples,
        "bootstrap": {"resamples": judging.RESAMPLES, "seed": judging.SEED, "level": judging.LEVEL},
        **result.numbers,
    }
    text = to_markdown(report)
    name = f"{split}-{run.checkpoint.path.name}"
    if other:  # two files may have one name
        name = f"{Path(dataset).stem}-{name}-{hashlib.sha256(str(Path(dataset).absolute()).encode()).hexdigest()[:6]}"

    def fill(folder: Path) -> None:
        result.draw(folder)
        (folder / "evaluation.md").write_text(text, encoding="utf-8")
        (folder / "evaluation.json").write_text(json.dumps(report) + "\n", encoding="utf-8")

    folder = run.path / "evaluation" / name
    try:
        folder.parent.mkdir(exist_ok=True)
        storage.commit_directory(folder, fill)
    except OSError as error:
        storage.remove_tree(folder.with_name(f".tmp-{name}"))
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from error
    print(text)
    return folder
