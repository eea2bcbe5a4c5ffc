"""A run made again from its folder: settings, weights, preprocessing, model. For evaluation, prediction and export."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import nn

from data_modules.decoding import Decoder
from data_modules.errors import DataError
from data_modules.images import ImagePreprocessing
from data_modules.load import restore_preprocessing
from data_modules.options import DataOptions
from data_modules.splits import InputSpec, Normalization, Preprocessing
from train.engine.checkpoint import Checkpoint
from train.engine.errors import UsageError
from train.engine.named_checkpoint import find_checkpoint, find_folder
from train.engine.runtime import Runtime, start_runtime
from train.engine.settings import TrainSettings
from train.engine.state import restore_model

Kind = Literal["classify", "reconstruct", "stateful_lstm"]
# A setting that only this script has.
KINDS: dict[str, Kind] = {"label_smoothing": "classify", "bottleneck": "reconstruct", "window": "stateful_lstm"}


@dataclass(frozen=True)
class TrainedRun:
    """A run at one of its checkpoints."""

    path: Path
    kind: Kind  # the script that trained it
    checkpoint: Checkpoint
    preprocessing: dict[str, Any]  # as in preprocessing.json; none of a stateful run

    @property
    def config(self) -> dict[str, Any]:
        """Settings by name."""
        values: dict[str, Any] = self.checkpoint.record["config"]
        return values

    @property
    def weights(self) -> str:
        """The part of the checkpoint that the run was judged by: model, or ema for the average of the weights."""
        return "ema" if self.config.get("best_metric", "").startswith("val/ema_") else "model"

    @property
    def inputs(self) -> InputSpec:
        """What the model takes; not of a stateful run."""
        return InputSpec(**_with_tuples(self.checkpoint.record["data"]["inputs"]))

    @property
    def class_names(self) -> list[str]:
        """In the order of the logits; none of other runs than those of classify."""
        names: list[str] = self.preprocessing.get("class_names", [])
        return names

    @property
    def data_options(self) -> DataOptions:
        """What was said of the data in training."""
        return DataOptions(**_with_tuples({field.name: self.config[field.name] for field in fields(DataOptions)}))


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return values from JSON, which has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def open_run(folder: str, wish: str) -> TrainedRun:
    """Open a run at a checkpoint.

    Args:
        folder: of the run.
        wish: best, latest or a step.

    Raises:
        UsageError: there is no such run or checkpoint, or a file of it is missing or damaged.
    """
    if not re.fullmatch("best|latest|[0-9]{1,18}", wish):
        raise UsageError(f"--checkpoint {wish}: is neither best, latest nor a step")
    path = find_folder(folder).parent
    try:
        found = find_checkpoint(path / "checkpoints", wish)
    except UsageError as error:
        hint = f"choose another with --checkpoint; python train/checkpoints.py {folder} lists them"
        raise UsageError([*error.problems, hint]) from error
    kind = next((kind for setting, kind in KINDS.items() if setting in found.record["config"]), None)
    if kind is None:
        raise UsageError(f"{path}: was trained by none of {', '.join(KINDS.values())}; its model is not known here")
    run = TrainedRun(path, kind, found, {} if kind == "stateful_lstm" else _read_preprocessing(path))
    if run.preprocessing:
        held = {name: found.record["data"][name] for name in ("class_names", "normalization")}
        if held != {name: run.preprocessing.get(name) for name in held}:
            raise UsageError(
                f"{path / 'preprocessing.json'}: has other classes or another normalization than {found.path}; put the "
                "file of this run back"
            )
    return run


def _read_preprocessing(path: Path) -> dict[str, Any]:
    file = path / "preprocessing.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["fitted"] is not None:
            restore_preprocessing(values)
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be read ({error.strerror}); without it new samples cannot be treated as those of training"
        ) from error
    except Exception as error:  # the tokenizer's own errors are plain Exceptions
        raise UsageError(f"{file}: is damaged ({error!r}); put the file of this run back") from error
    return dict(values)


def restore_reader(run: TrainedRun) -> tuple[Preprocessing, Normalization | None]:
    """Return what turns rows of files into samples of this run, and what normalises them.

    Raises:
        DataError: the run was trained on samples that no file can hold.
    """
    known, normalization = run.preprocessing, run.preprocessing["normalization"]
    if known["fitted"] is not None:
        return restore_preprocessing(known), normalization and _normalization(normalization)
    if known["task"] != "image":
        raise DataError(f"{run.path}: was trained on {run.config['dataset']}, whose samples are in no file")
    # The scans of digits are arrays in 17 grey levels; an image of 256 levels is brought to the same range.
    channels, height, width = run.inputs.shape
    decoder = Decoder("L" if channels == 1 else "RGB", height, width, resize=True)
    return ImagePreprocessing("image", decoder), _normalization({**normalization, "scale": 1 / 255})


def _normalization(values: dict[str, Any]) -> Normalization:
    return Normalization(**_with_tuples(values))


def build_model(run: TrainedRun) -> nn.Module:
    """Build the model of a run on the CPU, with its weights, for evaluation.

    Raises:
        UsageError: the checkpoint does not fit the model, because the program has changed.
    """
    model = _build_untrained(run)
    try:
        restore_model(model, run.checkpoint.load()[run.weights], run.checkpoint.record["aliases"])
    except ValueError as error:
        raise UsageError(f"{run.checkpoint.path}: {error}") from error
    return model.eval()


def _build_untrained(run: TrainedRun) -> nn.Module:
    config = run.config
    if run.kind == "classify":
        from models.classifiers import build_classifier

        architecture = run.checkpoint.record.get("architecture")
        try:
            return build_classifier(
                config["model"], num_classes=len(run.class_names), config=architecture, **vars(run.inputs)
            )
        except ValueError as error:  # of a library that is not on this machine
            raise UsageError(f"{run.path}: {error}") from error
    if run.kind == "reconstruct":
        from models.autoencoder import ConvAutoencoder

        return ConvAutoencoder(run.inputs.shape, config["bottleneck"], config["width"], vae=config["kl_weight"] > 0)
    from models.frequency_lstm import FrequencyLSTM

    return FrequencyLSTM(run.checkpoint.record["data"]["splits"]["train"]["columns"], config["hidden_size"])


def start_processes(run: TrainedRun) -> Runtime:
    """Start Accelerate in the precision of the run, as far as the device has it.

    Raises:
        UsageError: the launcher cuts models into shards.
    """
    precision = run.checkpoint.record["precision"]
    if precision in ("fp16", "fp8") and not torch.accelerator.is_available():
        precision = "no"
    runtime = start_runtime(TrainSettings(mixed_precision=precision))
    if runtime.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(
            "every process holds the whole model here: launch with --config_file launch/multi_gpu.yaml or "
            "launch/multi_cpu.yaml, not with FSDP or DeepSpeed"
        )
    return runtime


def place_model(run: TrainedRun, runtime: Runtime) -> nn.Module:
    """Build the model on the device of this process; it computes in the precision of the run."""
    model: nn.Module = runtime.accelerator.prepare_model(build_model(run), evaluation_mode=True)
    return model
