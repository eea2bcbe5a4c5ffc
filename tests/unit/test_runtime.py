"""Processes that were started with different commands are found before they train apart."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from train.classify import ClassifySettings
from train.engine.errors import UsageError
from train.engine.runtime import _check_same_command


def check(monkeypatch, *others):
    """Let rank 0 find others beside it, which changed what they say of their script and settings."""
    monkeypatch.setattr(sys, "argv", ["train/classify.py"])

    def share(value):
        _, mine = value
        return [value, *((f"machine{rank}", {**mine, **other}) for rank, other in enumerate(others, 1))]

    _check_same_command(SimpleNamespace(share=share), ClassifySettings())


def test_the_same_command_everywhere_passes(monkeypatch):
    check(monkeypatch, {}, {})


def test_other_settings_are_named_with_their_process(monkeypatch):
    with pytest.raises(UsageError) as caught:
        check(monkeypatch, {}, {"learning_rate": 0.5, "seed": 9})
    message = str(caught.value)
    assert "rank 2 on machine2" in message
    assert "learning_rate 0.5 instead of 0.001" in message and "seed 9 instead of 0" in message


def test_another_script_is_named(monkeypatch):
    settings = dataclasses.asdict(ClassifySettings())
    with pytest.raises(UsageError, match=r"script 'reconstruct.py' instead of 'classify.py'.*bottleneck 32"):
        check(monkeypatch, {**settings, "script": "reconstruct.py", "bottleneck": 32})
