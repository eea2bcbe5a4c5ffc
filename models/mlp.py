"""Multilayer perceptron for points, small images and tables."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn


class MLP(nn.Module):
    """Two linear layers with ReLU between them: any input shape, flattened, to class logits [B, num_classes].

    Each categorical column of a table, of numbers below its size, is embedded in half as many dimensions, at most 16;
    these are appended to the inputs. The embedding of number 0, for unknown categories, is zero.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (2,),
        num_classes: int = 2,
        hidden_size: int = 32,
        category_sizes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        widths = [min(16, (size + 1) // 2) for size in category_sizes]
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(prod(input_shape) + sum(widths), hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, num_classes),
        )
        # Made last, and only where there are categories: without them names and initial weights stay what they were.
        embeddings = [nn.Embedding(size, width) for size, width in zip(category_sizes, widths)]
        for embedding in embeddings:
            # No sample of training is of category 0, unknown: what it begins with, it keeps.
            nn.init.zeros_(embedding.weight[0])
        self.embeddings = nn.ModuleList(embeddings) if embeddings else None

    def forward(self, inputs: torch.Tensor, categories: torch.Tensor | None = None) -> torch.Tensor:
        """Return class logits [B, num_classes] for inputs [B, ...] and int64 categories [B, number of columns]."""
        embeddings = self.embeddings or ()
        columns = () if categories is None else categories.unbind(dim=1)
        assert len(columns) == len(embeddings), "one column of categories for each embedding"
        if columns:
            inputs = torch.cat([inputs.flatten(1), *(embed(part) for embed, part in zip(embeddings, columns))], dim=1)
        logits: torch.Tensor = self.layers(inputs)
        return logits
