"""The shell loop of docs/cluster.md that starts a run until it is done, with a program that only answers."""

import os
import re
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"
# Takes the next of "CODE[s][i][f]": exit code, saves a step, interrupts the loop, makes the stop file.
FAKE_PYTHON = """#!/bin/bash
read -r answer rest <<< "$(cat answers)"
echo "$rest" > answers
echo start >> starts
[[ $answer != *s* ]] || mkdir -p "runs/NAME/checkpoints/step_$(printf %08d "$(wc -l < starts)")"
[[ $answer != *i* ]] || kill -TERM "$PPID"
[[ $answer != *f* ]] || touch stop
exit "${answer//[sif]/}"
"""
# The answers, the exit code of the loop, and how many there were starts.
CASES = {
    "done": ("0", 0, 1),
    "stopped and saved, then done": ("75s 75 0", 0, 3),
    "bad input": ("2s 0", 2, 1),
    "preflight failed": ("3s 0", 3, 1),
    "crashed after new checkpoints, then done": ("1s 137s 0", 0, 3),
    "crashed before a new checkpoint": ("75s 1 0", 1, 2),
    "crashed too often": ("1s 1s 1s 1s 1s 1s 0", 1, 6),
    "interrupted": ("75si 0", 75, 1),
    "asked by the file": ("75s 75sf 0", 75, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_again_or_not(tmp_path, case):
    answers, code, starts = CASES[case]
    (loop,) = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "answers").write_text(answers)
    (tmp_path / "runs/NAME/checkpoints/step_00000000").mkdir(parents=True)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EXACT_TRAINING_STOP_FILE": str(tmp_path / "stop")}
    finished = subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=environment, timeout=60)
    assert finished.returncode == code
    assert (tmp_path / "starts").read_text().count("start") == starts
