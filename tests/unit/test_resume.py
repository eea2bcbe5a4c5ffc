"""Which settings a checkpoint may be resumed with."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.classify import ClassifySettings
from train.engine.checkpoint import Checkpoint
from train.engine.errors import UsageError
from train.engine.resume import compare_settings, environment

RUNTIME = SimpleNamespace(
    accelerator=SimpleNamespace(mixed_precision="no"), num_processes=1, device=torch.device("cpu")
)
DATA = {"fingerprint": "f"}


def checkpoint_of(settings, *older_than):
    """Return a checkpoint of a run with these settings, from before the settings `older_than` were there."""
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name not in older_than}
    record = {"config": config, "data": DATA, "precision": "no", "environment": environment(RUNTIME)}
    return Checkpoint(Path("step_00000001"), 1, record, ())


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default():
    old = checkpoint_of(ClassifySettings(), "freeze", "init_from", "ema_decay")
    assert compare_settings(ClassifySettings(), RUNTIME, DATA, old) == []
    with pytest.raises(UsageError, match=r"freeze: \[\] in the checkpoint, \['features\.\*'\] now"):
        compare_settings(ClassifySettings(freeze=("features.*",)), RUNTIME, DATA, old)
    with pytest.raises(UsageError, match=r"ema_decay: 0\.0 in the checkpoint, 0\.9 now"):
        compare_settings(ClassifySettings(ema_decay=0.9), RUNTIME, DATA, old)
