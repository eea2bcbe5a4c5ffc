"""Train a classifier of images, text, tables or points: accelerate launch train/classify.py [--FLAG VALUE ...]."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_modules.errors import DataError
from data_modules.options import DataOptions
from train.engine.cli import run_script
from train.engine.errors import UsageError
from train.engine.settings import TrainSettings, check_best_metric

if TYPE_CHECKING:  # torch takes seconds to import: --help and refused flags answer without it
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from data_modules.loader import TrainingLoader
    from data_modules.splits import Batch, DataModule, InputSpec, Split
    from data_modules.stream import StreamLoader
    from train.engine.contract import Measure, Score, Task

MODELS = ("mlp", "mnist_cnn", "simple_cnn", "fast_cnn", "simple_lstm")
LIBRARIES = {"timm": "timm", "hf": "transformers"}  # whose models are named timm:NAME and hf:NAME
METRICS = ("loss", "accuracy")
EVALUATION_BATCH = 512  # samples of one process; changes no result beyond the order of sums
DEFAULT_MODELS = {"image": "simple_cnn", "text": "simple_lstm", "table": "mlp", "points": "mlp"}


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(DataOptions, TrainSettings):
    """Settings of classification."""

    model: str | None = None
    """Network to train: mlp, mnist_cnn, simple_cnn, fast_cnn or simple_lstm; timm:NAME or hf:NAME with those
    libraries. Default: simple_cnn for images, simple_lstm for text, mlp for tables and points."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in training only."""
    augment: tuple[str, ...] = ()
    """Random changes of training images, such as: crop:4 flip rotate:10 scale:0.1 cutout:8 mixup:0.2."""
    class_balance: Literal["none", "weights", "sampler"] = "none"
    """weights: rare classes weigh more in the training loss. sampler: every class is drawn equally often."""

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield from TrainSettings.conditions(self)
        yield from DataOptions.conditions(self)
        library, colon, name = (MODELS[0] if self.model is None else self.model).partition(":")
        known = (library in MODELS and not colon) or (library in LIBRARIES and bool(name))
        yield known, "model", f"one of {', '.join(MODELS)}, timm:NAME, hf:NAME"
        missing = known and bool(colon) and importlib.util.find_spec(LIBRARIES[library]) is None
        yield not missing, "model", "something else, or do: pip install '.[backbones]'"
        yield 0 <= self.label_smoothing < 1, "label_smoothing", "0 or more and below 1"


def build_model(name: str, inputs: InputSpec, num_classes: int) -> nn.Module:
    """Build a model that takes such samples and gives a logit for each class.

    Raises:
        UsageError: the model cannot take such samples.
    """
    from models.classifiers import build_classifier

    try:
        if ":" not in name and (name == "simple_lstm") != (inputs.task == "text"):
            raise ValueError(f"{name} does not take {inputs.task} samples; try {DEFAULT_MODELS[inputs.task]}")
        return build_classifier(name, num_classes=num_classes, **vars(inputs))
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error


def predict(names: Sequence[str], model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits of a batch, float32 [B, number of classes]; `names` are the tensors that the model takes."""
    # FSDP2's mixed precision hands out bf16 or fp16; losses and sums of that have two digits.
    logits: torch.Tensor = model(*(batch[name] for name in names)).float()
    return logits


def build_measure(
    settings: ClassifySettings, data: DataModule, device: torch.device, *, with_predicted: bool = False
) -> Measure:
    """Return what computes cross-entropy, accuracy and, if wanted, the predicted class of each sample, all [B]."""
    from torch.nn import functional as F

    from data_modules.stratify import class_weights

    weights = None
    if settings.class_balance == "weights":
        weights = class_weights(data.train.labels, len(data.class_names)).to(device)

    def measure(model: nn.Module, batch: Batch) -> Batch:
        logits, labels = predict(data.inputs.names, model, batch), batch["labels"]
        entropy = partial(F.cross_entropy, logits, reduction="none")
        if model.training:  # what is measured in evaluation is plain
            entropy = partial(entropy, weight=weights, label_smoothing=settings.label_smoothing)
        loss = entropy(labels)
        if "weights" in batch:  # mixed with a partner
            loss = batch["weights"] * loss + (1 - batch["weights"]) * entropy(batch["partner_labels"])
        predicted = logits.argmax(dim=1)
        values = {"loss": loss, "accuracy": (predicted == labels).float()}
        return values | {"predicted": predicted} if with_predicted else values

    return measure


def build_task(data: DataModule, loader: TrainingLoader | StreamLoader, device: torch.device) -> Task:
    """Return what preflight must know of classification."""
    import torch

    from train.engine.contract import Task

    num_classes = len(data.class_names)

    def load(split: str, indices: torch.Tensor, epoch: int | None) -> Batch:
        if epoch is not None:
            return loader.load(indices, epoch)
        return data.prepare(data.splits()[split].gather(indices), device)

    def entropy_of_labels(batch: Batch) -> float:
        shares = torch.bincount(batch["labels"], minlength=num_classes) / len(batch["labels"])
        return float(torch.special.entr(shares).sum())

    return Task(
        splits={"train": data.train, "validation": data.validation},
        load=load,
        predict=partial(predict, data.inputs.names),
        inputs=data.inputs.names,
        targets=("labels",),
        untrained_loss=lambda batch: math.log(num_classes),
        constant_loss=entropy_of_labels,
        num_classes=num_classes,
        augmented=bool(loader.augmentation),
        overfit_metrics={"accuracy": 1.0},
    )


def main(settings: ClassifySettings) -> int:
    """Train, or go on training, and return the exit code."""
    from data_modules.augmentation import build_augmentation, check_augmentation
    from data_modules.load import load_data
    from data_modules.loader import EvaluationLoader
    from data_modules.look import look_at_data
    from data_modules.training_loader import build_training_loader
    from train.engine import session as sessions
    from train.engine.adaptation import adapt_model
    from train.engine.checks.subject import Subject
    from train.engine.evaluation import build_score
    from train.engine.randomness import seed_all
    from train.engine.runtime import start_runtime
    from train.engine.training import carry_out
    from train.evaluation.confusion import MOST_CLASSES, ConfusionMatrix

    check_best_metric(settings, METRICS)
    sessions.check_output(settings)
    runtime = start_runtime(settings)
    augmentation = build_augmentation(settings.augment)
    data = runtime.main_first(lambda: load_data(settings))
    check_augmentation(augmentation, data.inputs)
    for note in data.notes:
        runtime.say(f"{settings.dataset}: {note}")
    model_name = settings.model or DEFAULT_MODELS[data.inputs.task]
    run_name = settings.run_name or sessions.default_run_name(
        settings, ["classify", Path(settings.dataset).stem, model_name]
    )
    settings = dataclasses.replace(settings, run_name=run_name, model=model_name, best_mode=settings.mode)
    seed_all(settings.seed)
    model = build_model(model_name, data.inputs, len(data.class_names))
    adapt_model(settings, runtime, model)

    session = sessions.open_session(settings, runtime, data.describe(), model)
    state = sessions.prepare_state(settings, runtime, session, model)
    batching = session.batching
    place = {"rank": runtime.rank, "num_processes": runtime.num_processes}
    loader = build_training_loader(
        data,
        batch_size=batching.batch_size,
        num_slots=batching.slots,
        device=runtime.device,
        num_workers=settings.num_workers,
        seed=settings.seed,
        augmentation=augmentation,
        balanced=settings.class_balance == "sampler",
        place=state.progress.stream,
        remember=lambda place: setattr(state.progress, "stream", place),
        **place,
    )
    measure = build_measure(settings, data, runtime.device)

    def score(split: Split, matrix: ConfusionMatrix | None = None) -> Score:
        batches = EvaluationLoader(
            data, split, EVALUATION_BATCH, device=runtime.device, num_workers=settings.num_workers, **place
        )
        measured = build_measure(settings, data, runtime.device, with_predicted=matrix is not None)
        return build_score(settings, runtime, measured, batches, matrix)

    tracker = sessions.start_tracking(settings, runtime, session)
    sessions.show_inputs(runtime, session, partial(look_at_data, data, loader), data.describe_preprocessing())
    classes = f"{len(data.class_names)} classes"
    runtime.say(f"{settings.dataset}: {loader.num_samples:,} training samples, {data.inputs}, {classes}")
    runtime.say(f"{model_name}: {sessions.describe_start(runtime, session, model)}")
    subject = Subject(
        settings=settings,
        runtime=runtime,
        session=session,
        state=state,
        loader=loader,
        measure=measure,
        evaluate=score(data.validation),
        data=data.describe(),
        task=build_task(data, loader, runtime.device),
    )
    matrix = None
    if session.run is not None and len(data.class_names) <= MOST_CLASSES:
        matrix = ConfusionMatrix(data.class_names, session.run.plots / "confusion_matrix.png", runtime)
    return carry_out(subject, tracker, None if data.test is None else score(data.test, matrix))


def run() -> None:
    """Run from the command line."""
    run_script(main, ClassifySettings, __doc__ or "", bad_input=DataError)


if __name__ == "__main__":
    run()
