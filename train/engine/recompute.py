"""--gradient_checkpointing: blocks keep their input only, and compute the rest again in the backward pass.

The second pass draws the same random numbers (torch keeps the generators), and must not count twice what batch norm
averages: so a run has the same bits with it and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from train.engine.errors import UsageError

Block = tuple[nn.Module, ...]


def recompute_blocks(model: nn.Module) -> None:
    """Let the blocks of a model be computed again in the backward pass; names of parameters stay as they are.

    A block begins at each convolution of an nn.Sequential that has two or more.

    Raises:
        UsageError: there are none.
    """
    found = False
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            blocks = _cut(module)
            if len(blocks) > 1:
                module.forward = partial(_forward, blocks)  # type: ignore[method-assign]
                found = True
    if not found:
        raise UsageError(
            "--gradient_checkpointing: is for two or more convolutions in one nn.Sequential, and "
            f"{type(model).__name__} has none; leave it out. A smaller --micro_batch_size saves memory with any model"
        )


def _cut(layers: nn.Sequential) -> list[Block]:
    blocks: list[Block] = []
    for layer in layers:
        # What stands before the first convolution belongs to its block.
        if isinstance(layer, _ConvNd) and blocks and any(isinstance(each, _ConvNd) for each in blocks[-1]):
            blocks.append((layer,))
        else:
            blocks = [*blocks[:-1], (*blocks[-1], layer)] if blocks else [(layer,)]
    return blocks


def _forward(blocks: list[Block], values: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        contexts = partial(_contexts, block)
        values = checkpoint(_compute, block, values, use_reentrant=False, context_fn=contexts)
    return values


def _compute(block: Block, values: torch.Tensor) -> torch.Tensor:
    for layer in block:
        values = layer(values)
    return values


def _contexts(block: Block) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the first and the second computation."""
    return nullcontext(), _averages_stand_still(block)


@contextmanager
def _averages_stand_still(block: Block) -> Iterator[None]:
    norms = [module for layer in block for module in layer.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, counted in kept:
        norm.momentum = 0.0  # of the new values; leaving the averages out would keep other tensors for backward
        norm.num_batches_tracked = None if counted is None else counted.clone()
    try:
        yield
    finally:
        for norm, momentum, counted in kept:
            norm.momentum, norm.num_batches_tracked = momentum, counted
