"""Classifiers of timm and of Hugging Face Transformers, with random weights, as the scripts call models.

Both libraries are optional and imported only if one is asked for. Weights come from a file: --init_from, which fits,
since parameters keep the names that they have there. Legend: B batch, L tokens of the longest, C, H, W of an image.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn

INSTALL = "pip install '.[backbones]'"


def build_backbone(
    name: str,
    task: str,
    num_classes: int,
    shape: tuple[int, ...],
    vocabulary_size: int,
    max_length: int,
    config: dict[str, Any] | None,
) -> nn.Module:
    """Build what `timm:NAME` or `hf:NAME` names, and see that it takes a sample.

    Args:
        name: of timm, a name that it lists; of hf, a hub id, a folder with config.json, or a kind such as bert.
        task: what the samples are, "image" or "text".
        num_classes: logits of a sample.
        shape: of an image, (C, H, W).
        vocabulary_size: of a text, token numbers are below it and 0 is padding.
        max_length: batches of texts have no more columns.
        config: of an hf model that was built before; takes the place of what NAME holds now.

    Raises:
        ValueError: there is no such model, it does not take such samples, or the library is not to be had.
    """
    library, _, wanted = name.partition(":")
    if task not in (("image",) if library == "timm" else ("image", "text")):
        raise ValueError(f"{name} does not take {task} samples")
    try:
        if library == "timm":
            model = _build_timm(wanted, shape, num_classes)
        else:
            model = _build_hf(wanted, task, shape, vocabulary_size, num_classes, config)
    except ImportError as error:
        raise ValueError(f"{name} needs a library: {INSTALL} ({_first_line(error)})") from error
    except (RuntimeError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{name} cannot be built ({_first_line(error)})") from error
    if task == "text":
        tokens_1L = torch.ones(1, max(1, max_length), dtype=torch.int64)
        sample = (tokens_1L, torch.tensor([tokens_1L.shape[1]]))
        _try_sample(name, model, sample, f"texts of {max_length} tokens (--max_length)")
    else:
        _try_sample(name, model, (torch.zeros(1, *shape),), f"an image of shape {shape}")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@torch.no_grad()
def _try_sample(name: str, model: nn.Module, sample: tuple[torch.Tensor, ...], what: str) -> None:
    """Let a model answer the largest sample, as the libraries say only then that it does not fit."""
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()(*sample)
    except Exception as error:  # whatever the library raises
        raise ValueError(f"{name} cannot take {what}: {_first_line(error)}") from error
    finally:
        model.train(training)


def _build_timm(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name}" + (f"; perhaps you meant {' or '.join(near)}" if near else ""))
    options: dict[str, Any] = {"in_chans": shape[0], "num_classes": num_classes}
    settings = timm.get_pretrained_cfg(name)
    if settings is not None and settings.fixed_input_size:  # of others, the size is no argument
        options["img_size"] = shape[1:]
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _build_hf(
    name: str,
    task: str,
    shape: tuple[int, ...],
    vocabulary_size: int,
    num_classes: int,
    saved: dict[str, Any] | None,
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if saved is not None:
        config = CONFIG_MAPPING[saved["model_type"]].from_dict(saved)
    elif name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name)
    elif (Path(name).is_absolute() or name.startswith(".")) and not (Path(name) / "config.json").exists():
        raise ValueError(f"hf:{name}: the folder is not there, or holds no config.json")
    else:
        config = AutoConfig.from_pretrained(name)
    kind = AutoModelForSequenceClassification if task == "text" else AutoModelForImageClassification
    if type(config) not in kind._model_mapping:
        raise ValueError(f"hf:{name}: {config.model_type} does not take {task} samples")
    config.num_labels = num_classes
    if task == "text":
        config.vocab_size, config.pad_token_id = vocabulary_size, 0
        return _called_as_here(kind.from_config(config), _forward_text)
    config.num_channels, config.image_size = shape[0], shape[1] if shape[1] == shape[2] else shape[1:]
    return _called_as_here(kind.from_config(config), _forward_images)


def _called_as_here(model: nn.Module, forward: Any) -> nn.Module:
    """Give a model another `forward`; a wrapper around it would change the names of its parameters."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "forward_of_library": kind.forward})
    return model


def _forward_images(self: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = self.forward_of_library(pixel_values=images_BCHW).logits
    return logits


def _forward_text(self: Any, tokens_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    mask_BL = (positions_L < lengths_B[:, None]).long()
    logits: torch.Tensor = self.forward_of_library(input_ids=tokens_BL, attention_mask=mask_BL).logits
    return logits
