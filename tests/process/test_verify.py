"""--verify_resume shows on the user's settings that a killed run equals a straight one, or says what differs."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.engine.verify import STEPS, _compare

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sound_settings_are_verified(tmp_path):
    command = [sys.executable, "train/classify.py", "--verify_resume", "--model", "mnist_cnn", "--ema_decay", "0.9"]
    finished = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "restarted: equal to the last bit" in finished.stdout
    assert not list(tmp_path.iterdir())


def test_differences_are_named(classify, capsys):
    for name, seed in (("straight", 0), ("restarted", 1)):
        classify.run(name, "--max_train_steps", STEPS, "--seed", seed)
    assert _compare(classify.folder) == 3
    printed = capsys.readouterr().out
    assert "differs: model classifier.1.weight, at most by 0." in printed
    assert "tensors differ" in printed
