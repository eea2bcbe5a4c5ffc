"""Which settings a checkpoint may be resumed with."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from train.classify import ClassifySettings
from train.engine.checkpoint import Checkpoint
from train.engine.errors import UsageError
from train.engine.initial import find_origin
from train.engine.resume import choose_origin, compare_settings, environment

RUNTIME = SimpleNamespace(
    accelerator=SimpleNamespace(mixed_precision="no"), num_processes=1, device=torch.device("cpu")
)
DATA = {"fingerprint": "f"}


def checkpoint_of(settings, *older_than, **more):
    """Return a checkpoint of a run with these settings, from before the settings `older_than` were there."""
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name not in older_than}
    record = {"config": config, "data": DATA, "precision": "no", "environment": environment(RUNTIME), **more}
    return Checkpoint(Path("step_00000001"), 1, record, ())


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default():
    old = checkpoint_of(ClassifySettings(), "freeze", "init_from", "ema_decay")
    assert compare_settings(ClassifySettings(), RUNTIME, DATA, None, old) == []
    with pytest.raises(UsageError, match=r"freeze: \[\] in the checkpoint, \['features\.\*'\] now"):
        compare_settings(ClassifySettings(freeze=("features.*",)), RUNTIME, DATA, None, old)
    with pytest.raises(UsageError, match=r"ema_decay: 0\.0 in the checkpoint, 0\.9 now"):
        compare_settings(ClassifySettings(ema_decay=0.9), RUNTIME, DATA, None, old)


@pytest.mark.parametrize("name", ["model", "optimizer", "freeze"])
def test_no_consent_is_asked_for_what_cannot_be_changed(name):
    old = checkpoint_of(ClassifySettings(model="mlp"))
    others = {"model": "mnist_cnn", "optimizer": "sgd", "freeze": ("*.bias",)}
    changed = dataclasses.replace(ClassifySettings(model="mlp"), **{name: others[name]})
    with pytest.raises(UsageError, match=f"The {name} cannot be another one within a run.*--init_from") as refused:
        compare_settings(changed, RUNTIME, DATA, None, old)
    assert "allow_changes" not in str(refused.value)


def test_another_configuration_of_a_library_model_needs_consent():
    old = checkpoint_of(ClassifySettings(), architecture={"layers": 2, "dropout": 0.1})
    assert compare_settings(ClassifySettings(), RUNTIME, DATA, {"layers": 2, "dropout": 0.1}, old) == []
    with pytest.raises(UsageError, match=r"architecture: {'dropout': 0.1} in the checkpoint, {'dropout': 0.5} now"):
        compare_settings(ClassifySettings(), RUNTIME, DATA, {"layers": 2, "dropout": 0.5}, old)
    agreed = ClassifySettings(allow_changes=("architecture",))
    assert compare_settings(agreed, RUNTIME, DATA, {"layers": 2, "dropout": 0.5}, old) != []


def test_weights_that_a_run_began_with_are_compared_by_content(tmp_path):
    """Neither another spelling of the path nor a file that is gone is another beginning."""
    for name in ("one", "copy", "other"):
        save_file({"weight": torch.full((2,), float(name == "other"))}, tmp_path / f"{name}.safetensors")

    def settings(name, *agreed):
        wish = None if name is None else str(tmp_path / f"{name}.safetensors")
        return ClassifySettings(init_from=wish, allow_changes=agreed)

    origin = find_origin(settings("one").init_from)
    assert choose_origin(settings("one"), None) == origin
    began = checkpoint_of(settings("one"), origin={**vars(origin), "path": str(origin.path)})
    assert compare_settings(settings("copy"), RUNTIME, DATA, None, began) == []
    for name in ("one", "copy", "gone"):
        assert choose_origin(settings(name), began) == origin
    for name in ("other", None):
        with pytest.raises(UsageError, match=r"began with other weights: those of .*one.safetensors.*allow_changes"):
            choose_origin(settings(name), began)
    # What was agreed to changes no record of the past: the weights are those of the checkpoint.
    assert choose_origin(settings("other", "init_from"), began) == origin
    random = checkpoint_of(settings(None))
    assert choose_origin(settings(None), random) is None
    with pytest.raises(UsageError, match="began with other weights: random ones, and now"):
        choose_origin(settings("one"), random)
    assert choose_origin(settings("one", "init_from"), random) is None
