"""Classifiers by the name that settings give them."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.backbones import build_backbone
from models.cnn import FastCNN, MnistCNN, SimpleCNN
from models.lstm import SimpleLSTM
from models.mlp import MLP


def build_classifier(
    name: str,
    task: str,
    num_classes: int,
    shape: tuple[int, ...] = (),
    vocabulary_size: int = 0,
    max_length: int = 0,
    category_sizes: tuple[int, ...] = (),
    config: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a model that gives a logit for each class.

    Args:
        name: mlp, mnist_cnn, simple_cnn, fast_cnn or simple_lstm, timm:NAME or hf:NAME.
        task: what the samples are: image, text, table or points.
        num_classes: logits of a sample.
        shape: of an image (C, H, W), or how many numbers a sample has (D,).
        vocabulary_size: token numbers of texts are below it.
        max_length: batches of texts have no more columns.
        category_sizes: of each categorical column of a table.
        config: of an hf model that was built before, in plain values.

    Raises:
        ValueError: the model cannot take such samples, or its library is not to be had.
    """
    if ":" in name:
        return build_backbone(name, task, num_classes, shape, vocabulary_size, max_length, config)
    if name == "simple_lstm":
        return SimpleLSTM(vocabulary_size, num_classes)
    if name == "mlp":
        return MLP(shape, num_classes, category_sizes=category_sizes)
    return {"mnist_cnn": MnistCNN, "simple_cnn": SimpleCNN, "fast_cnn": FastCNN}[name](shape, num_classes)
