"""Train a classifier of images or points: accelerate launch train/classify.py [--config RECIPE] [--FLAG VALUE ...]."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_modules.errors import DataError
from train.engine.cli import run_script
from train.engine.errors import EXIT_DONE, EXIT_STOPPED, UsageError
from train.engine.settings import TrainSettings, check_best_metric

if TYPE_CHECKING:  # torch takes seconds to import: --help and refused flags answer without it
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import nn

    from data_modules.splits import DataModule, Slot, Split
    from train.engine.contract import Measure

METRICS = ("loss", "accuracy")
EVALUATION_BATCH = 512  # samples of one process; changes no result beyond the order of sums


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(TrainSettings):
    """Settings of classification."""

    dataset: str = "digits"
    """digits, blobs, a folder of images, a .parquet file or folder, or a hub id."""
    image_column: str | None = None
    """Column that holds the images. Default: the only one there is."""
    label_column: str | None = None
    """Column that holds the labels. Default: found by type and name."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on. Default: the one named so, else cut from the training split."""
    test_split: str | None = None
    """Split for the score at the end. Default: the one named so, else none."""
    validation_fraction: float = 0.1
    """Share of the training split that is cut for validation where there is no such split."""
    image_size: int | None = None
    """Scale and crop all images to this many pixels a side."""
    model: Literal["mlp", "mnist_cnn", "simple_cnn", "fast_cnn"] = "simple_cnn"
    """Network to train."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in training only."""

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield from super().conditions()
        yield 0 <= self.label_smoothing < 1, "label_smoothing", "0 or more and below 1"
        yield 0 < self.validation_fraction < 1, "validation_fraction", "above 0 and below 1"
        yield self.image_size is None or self.image_size >= 1, "image_size", "1 or more"


def load_data(settings: ClassifySettings) -> DataModule:
    """Load the data set that the settings name.

    Raises:
        UsageError: the data cannot be used; says what, where and what to do.
    """
    from data_modules import embedded, images

    try:
        if settings.dataset == "digits":
            return embedded.load_digits()
        if settings.dataset == "blobs":
            return embedded.load_blobs()
        columns = images.ImageColumns(
            image=settings.image_column,
            label=settings.label_column,
            train=settings.train_split,
            validation=settings.validation_split,
            test=settings.test_split,
            validation_fraction=settings.validation_fraction,
            image_size=settings.image_size,
        )
        return images.load_images(settings.dataset, columns, in_memory=settings.num_workers == 0)
    except DataError as error:
        raise UsageError(str(error)) from error


def build_model(name: str, data: DataModule) -> nn.Module:
    """Build a model that takes the data's samples and gives a logit for each class.

    Raises:
        UsageError: the model cannot take such samples.
    """
    from models.cnn import FastCNN, MnistCNN, SimpleCNN
    from models.mlp import MLP

    kind = {"mlp": MLP, "mnist_cnn": MnistCNN, "simple_cnn": SimpleCNN, "fast_cnn": FastCNN}[name]
    try:
        return kind(data.input_shape, len(data.class_names))
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error


def build_measure(label_smoothing: float) -> Measure:
    """Return what computes cross-entropy and accuracy of each sample of a batch, both of shape [B]."""
    from torch.nn import functional as F

    def measure(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # FSDP2's mixed precision hands out bf16 or fp16; losses and sums of that have two digits.
        logits, labels = model(batch["inputs"]).float(), batch["labels"]
        smoothing = label_smoothing if model.training else 0.0
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing),
            "accuracy": (logits.argmax(dim=1) == labels).float(),
        }

    return measure


def main(settings: ClassifySettings) -> int:
    """Train, or go on training, and return the exit code."""
    from data_modules.loader import EvaluationLoader, TrainingLoader
    from data_modules.sampler import BatchSampler
    from train.engine import session as sessions
    from train.engine.evaluation import evaluate
    from train.engine.loop import Loop
    from train.engine.preemption import Request
    from train.engine.randomness import seed_all
    from train.engine.runtime import start_runtime

    check_best_metric(settings, METRICS)
    sessions.check_output(settings)
    runtime = start_runtime(settings)
    data = runtime.main_first(lambda: load_data(settings))
    for note in data.notes:
        runtime.say(f"{settings.dataset}: {note}")
    if settings.run_name is None:
        name = sessions.default_run_name(settings, ["classify", Path(settings.dataset).name, settings.model])
        settings = dataclasses.replace(settings, run_name=name)
    seed_all(settings.seed)
    model = build_model(settings.model, data)

    session = sessions.open_session(settings, runtime, data.describe())
    state = sessions.prepare_state(settings, runtime, session, model)
    batching = session.batching
    place = {"rank": runtime.rank, "num_processes": runtime.num_processes}
    sampler = BatchSampler(len(data.train), batching.batch_size, batching.slots, seed=settings.seed, **place)
    loader = TrainingLoader(data, sampler, runtime.device, settings.num_workers)

    measure = build_measure(settings.label_smoothing)

    def score(split: Split) -> Callable[[nn.Module], dict[str, float]]:
        batches: Iterable[Slot] = EvaluationLoader(
            data, split, EVALUATION_BATCH, device=runtime.device, num_workers=settings.num_workers, **place
        )
        if settings.dry_run:
            batches = list(islice(batches, 1))
        return lambda model: evaluate(model, measure, batches, runtime)

    test = None if data.test is None else score(data.test)
    tracker = sessions.start_tracking(settings, runtime, session)
    precision = {"no": "fp32"}.get(runtime.accelerator.mixed_precision, runtime.accelerator.mixed_precision)
    runtime.say(
        f"{settings.dataset}: {len(data.train):,} training samples of shape {data.input_shape}, "
        f"{len(data.class_names)} classes\n"
        f"{settings.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {runtime.device}, "
        f"{precision}, {batching}"
    )
    loop = Loop(settings, runtime, session, state, loader, measure, score(data.validation), tracker, data.describe())
    request = loop.train()
    sessions.finish(settings, runtime, session, state, tracker, test)
    runtime.close()
    if request is Request.STOP:
        print(f"saved at step {state.progress.step}; run the same command again to go on")
        return EXIT_STOPPED
    return EXIT_DONE


def run() -> None:
    """Run from the command line."""
    run_script(main, ClassifySettings, __doc__ or "", bad_input=DataError)


if __name__ == "__main__":
    run()
