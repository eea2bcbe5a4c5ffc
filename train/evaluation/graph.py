"""A run's model with its preprocessing inside, as one graph of tensors. Legend: B batch, C channels, H height, W width,
T tokens or time steps, D columns of numbers, K columns of categories, F input columns, S hidden state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from data_modules.splits import Normalization
from data_modules.tables import TablePreprocessing
from models.frequency_lstm import FrequencyLSTM
from train.evaluation.trained_run import TrainedRun, build_model, restore_reader

Answers = tuple[torch.Tensor, ...]
CLASSES = ("logits", "probabilities")


@dataclass(frozen=True)
class Graph:
    """A module that takes samples as people have them, and what is to be known of its inputs."""

    module: nn.Module
    examples: dict[str, torch.Tensor]  # by the names of the inputs; sizes that vary are 2 or more
    dynamic: dict[str, dict[int, str]]  # the names of the sizes that vary, by input and dimension
    outputs: tuple[str, ...]
    lengths: tuple[int, int | None] = (1, None)  # least and most of the size "length"


def _with_probabilities(logits: torch.Tensor) -> Answers:
    return logits, logits.softmax(dim=1)


class _Normalized(nn.Module):
    """Stored uint8 pixels to standardised ones."""

    factor: torch.Tensor  # [C, 1, 1]
    shift: torch.Tensor

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (normalization.mean, normalization.std))
        self.register_buffer("factor", (normalization.scale / std).float()[:, None, None])
        self.register_buffer("shift", (-mean / std).float()[:, None, None])

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 images [B, C, H, W]."""
        return images_BCHW.float() * self.factor + self.shift


class ImageGraph(nn.Module):
    """uint8 images [B, C, H, W] to logits and probabilities."""

    def __init__(self, model: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.normalized, self.model = _Normalized(normalization), model

    def forward(self, images: torch.Tensor) -> Answers:
        """Return logits and probabilities, [B, number of classes]."""
        return _with_probabilities(self.model(self.normalized(images)))


class ReconstructionGraph(ImageGraph):
    """uint8 images [B, C, H, W] to their reconstructions in [0, 1]; a variational autoencoder decodes the mean."""

    def forward(self, images: torch.Tensor) -> Answers:
        """Return float32 images [B, C, H, W]."""
        return (self.model(self.normalized(images)),)


class PointGraph(nn.Module):
    """float32 points [B, D], taken as they are, to logits and probabilities."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, points: torch.Tensor) -> Answers:
        """Return logits and probabilities, [B, number of classes]."""
        return _with_probabilities(self.model(points))


class TextGraph(nn.Module):
    """Token numbers [B, T], 0 behind a text, and lengths [B] to logits and probabilities."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> Answers:
        """Return logits and probabilities, [B, number of classes]."""
        return _with_probabilities(self.model(tokens, lengths))


class TableGraph(nn.Module):
    """Raw numbers, float64 [B, D] with NaN where one is missing, and codes of categories, int64 [B, K].

    Numbers are float64 for the reason that preprocessing has: large ones, such as years, lose digits in float32 before
    the mean is subtracted.
    """

    mean: torch.Tensor  # [D]
    std: torch.Tensor
    flagged: torch.Tensor  # the columns that have an indicator

    def __init__(self, model: nn.Module, fitted: TablePreprocessing) -> None:
        super().__init__()
        self.model = model
        numbers = fitted.numbers
        self.register_buffer("mean", torch.tensor([column.mean for column in numbers], dtype=torch.float64))
        self.register_buffer("std", torch.tensor([column.std for column in numbers], dtype=torch.float64))
        flagged = [place for place, column in enumerate(numbers) if column.indicator]
        self.register_buffer("flagged", torch.tensor(flagged, dtype=torch.int64))

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor | None = None) -> Answers:
        """Return logits and probabilities, [B, number of classes]."""
        missing_BD = numbers.isnan()
        standard_BD = ((numbers - self.mean) / self.std).float().masked_fill(missing_BD, 0.0)
        flags = missing_BD.index_select(1, self.flagged).float()
        return _with_probabilities(self.model(torch.cat([standard_BD, flags], dim=1), categories))


class CategoryGraph(nn.Module):
    """Codes of categories, int64 [B, K], of a table without numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, categories: torch.Tensor) -> Answers:
        """Return logits and probabilities, [B, number of classes]."""
        nothing_B0 = torch.zeros(categories.shape[0], 0)
        return _with_probabilities(self.model(nothing_B0, categories))


class StatefulGraph(nn.Module):
    """Samples in the order of time, and the state before them, to answers and the state behind them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Answers:
        """Return answers [B, T, 1], h and c [1, B, S], for samples [B, T, F]."""
        answers, (h_after, c_after) = self.model(samples, (h, c))
        return answers, h_after, c_after


def build_graph(run: TrainedRun) -> Graph:
    """Return the graph of a run, with its weights, in float32 on the CPU.

    Raises:
        UsageError: the checkpoint does not fit the model.
    """
    model = build_model(run)
    if isinstance(model, FrequencyLSTM):
        return _stateful(model)
    batch = {0: "batch"}
    if run.inputs.task == "image":
        reconstructs = run.kind == "reconstruct"
        kind = ReconstructionGraph if reconstructs else ImageGraph
        outputs = ("reconstruction",) if reconstructs else CLASSES
        images = torch.zeros(2, *run.inputs.shape, dtype=torch.uint8)
        return _freeze(kind(model, normalization_of(run)), {"images": images}, {"images": batch}, outputs)
    if run.inputs.task == "text":
        examples = {"tokens": torch.ones(2, 8, dtype=torch.int64), "lengths": torch.full((2,), 8)}
        dynamic = {"tokens": {0: "batch", 1: "length"}, "lengths": batch}
        graph = _freeze(TextGraph(model), examples, dynamic, CLASSES)
        # A model of Transformers has positions up to a bound, and torch.export (2.13) makes a case apart of one token.
        return graph if ":" not in run.config["model"] else replace(graph, lengths=(2, run.inputs.max_length))
    if run.inputs.task == "points":
        return _freeze(PointGraph(model), {"points": torch.zeros(2, *run.inputs.shape)}, {"points": batch}, CLASSES)
    fitted = fitted_table(run)
    examples = {
        "numbers": torch.zeros(2, len(fitted.numbers), dtype=torch.float64),
        "categories": torch.zeros(2, len(fitted.categories), dtype=torch.int64),
    }
    examples = {name: values for name, values in examples.items() if values.shape[1]}
    module = TableGraph(model, fitted) if fitted.numbers else CategoryGraph(model)
    return _freeze(module, examples, dict.fromkeys(examples, batch), CLASSES)


def _stateful(model: FrequencyLSTM) -> Graph:
    size = model.lstm.hidden_size
    examples = {
        "samples": torch.zeros(2, 3, model.lstm.input_size),
        "h": torch.zeros(1, 2, size),
        "c": torch.zeros(1, 2, size),
    }
    dynamic = {"samples": {0: "batch", 1: "length"}, "h": {1: "batch"}, "c": {1: "batch"}}
    return _freeze(StatefulGraph(model), examples, dynamic, ("answers", "h_after", "c_after"))


def _freeze(
    module: nn.Module,
    examples: dict[str, torch.Tensor],
    dynamic: dict[str, dict[int, str]],
    outputs: tuple[str, ...],
) -> Graph:
    return Graph(module.eval().requires_grad_(False), examples, dynamic, outputs)


def normalization_of(run: TrainedRun) -> Normalization:
    """Return what normalises the stored images of a run."""
    values: dict[str, Any] = run.preprocessing["normalization"]
    return Normalization(values["scale"], tuple(values["mean"]), tuple(values["std"]))


def fitted_table(run: TrainedRun) -> TablePreprocessing:
    """Return the columns of a run on a table."""
    fitted = restore_reader(run)[0]
    assert isinstance(fitted, TablePreprocessing)
    return fitted
