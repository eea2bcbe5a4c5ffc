"""What cannot be had together is refused with what to do instead."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from models.cnn import SimpleCNN
from train.classify import ClassifySettings
from train.engine.adaptation import adapt_model
from train.engine.errors import UsageError
from train.engine.settings import check_settings


def runtime_of(kind):
    accelerator = SimpleNamespace(is_fsdp2=kind == DistributedType.FSDP, distributed_type=kind)
    return SimpleNamespace(accelerator=accelerator)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MULTI_CPU])
@pytest.mark.parametrize(
    ("name", "value"),
    [("reduction", "exact"), ("optimizer", "muon"), ("channels_last", True), ("gradient_checkpointing", True)],
)
def test_what_wrappers_cannot_do_is_refused(kind, name, value):
    settings, model = ClassifySettings(**{name: value}), SimpleCNN((1, 8, 8))
    recomputed = name == "gradient_checkpointing" and kind == DistributedType.DEEPSPEED
    if kind == DistributedType.MULTI_CPU or recomputed:
        adapt_model(settings, runtime_of(kind), model)
    else:
        with pytest.raises(UsageError, match=f"--{name}.*FSDP"):
            adapt_model(settings, runtime_of(kind), model)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"gradient_checkpointing": True, "compile": True}, "gradient_checkpointing"),
        ({"profile": True, "dry_run": True}, "profile"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(settings, name):
    (problem,) = check_settings(ClassifySettings(**settings))
    assert problem.startswith(f"--{name} True: must be left out")
    for each in settings:
        assert check_settings(ClassifySettings(**{each: True})) == []
