"""--freeze: parameters that stay as they are, by pattern of their names; and those that the loss cannot move."""

from __future__ import annotations

import types
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from train.engine.errors import UsageError
from train.engine.tensors import clean_name

MOST_NAMES = 40  # in a message


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the gradients of the parameters whose names match, and keep their batch norms in evaluation mode.

    A batch norm whose averages went on moving would be another layer than the one that was frozen. Its averages
    belong to its parameters; of one without parameters, the name of its averages must match.

    Raises:
        UsageError: a pattern matches nothing, or all are frozen; lists the names there are.
    """
    names = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    listed = "\n  ".join(names[:MOST_NAMES]) + (f"\n  and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else "")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--freeze '{pattern}': no parameter has such a name. There are:\n  {listed}")

    def frozen(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    if all(map(frozen, names)):
        raise UsageError(f"--freeze: nothing is left to train. The parameters are:\n  {listed}")
    for name, parameter in model.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            prefix = f"{name}." if name else ""
            own = [each for each in names if each.startswith(prefix)] or [
                each for each in buffers if each.startswith(prefix)
            ]
            if own and all(map(frozen, own)):
                _keep_in_evaluation(module)


def stays_in_evaluation(module: nn.Module) -> bool:
    """Say whether this is a frozen batch norm."""
    return "train" in vars(module)


def _keep_in_evaluation(module: nn.Module) -> None:
    module.eval()
    # The loop, evaluation and preflight switch whole models; this one layer does not follow.
    module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]


def refuse_unused(model: nn.Module) -> None:
    """Name the trained parameters without a gradient; DistributedDataParallel fails one step later without a name.

    Raises:
        UsageError: always.
    """
    unused = [clean_name(name) for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    names = " ".join(unused[:MOST_NAMES])
    raise UsageError(
        "with several processes the loss must depend on each parameter that is trained, and no gradient reaches "
        f"{len(unused)} of them. Take them out of the model, or out of training: --freeze {names}"
    )
