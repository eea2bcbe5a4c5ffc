"""Runs of tests/cluster/paced.py on two machines, and how they are compared with one that nobody disturbs."""

import json
import time
from pathlib import Path

from tests.process.conftest import Runs

ROOT = Path(__file__).parents[2]
STEPS = 40
SETTINGS = [
    "--model", "mlp", "--batch_size", "160", "--lr_scheduler", "cosine", "--max_train_steps", str(STEPS),
    "--log_every", "2", "--eval_every", "20", "--checkpoint_every", "4", "--preflight", "off",
]  # fmt: skip
ALL_LINES = [*range(2, STEPS + 1, 2), STEPS]  # of metrics.jsonl; the last one holds the score of the test split


class PacedRuns(Runs):
    """Runs in a folder of their own, among them `straight` on two processes of this machine."""

    def __init__(self, folder):
        super().__init__(folder, "classify")

    def describe(self):
        """Return what helps where a run does not go on."""
        raise NotImplementedError

    def identity(self, name):
        """Return the id of a run."""
        return json.loads((self.folder / name / "run.json").read_text())["id"]

    def wait_step(self, name, step):
        """Wait until a run has a checkpoint of that step or a later one; return its id."""
        self._wait_until(lambda: self.steps(name) and self.steps(name)[-1] >= step)
        return self.identity(name)

    def wait_line(self, name, step):
        """Wait until a run has written the metrics of that step."""
        file = self.folder / name / "metrics.jsonl"
        self._wait_until(lambda: file.exists() and f'"step": {step},' in file.read_text())

    def assert_whole(self, name, straight="straight"):
        """Fail unless a run is done and equals the one without interruption."""
        self.assert_same(straight, name, STEPS)
        assert [line["step"] for line in self.metrics(name)] == ALL_LINES

    def _wait_until(self, condition, seconds=180):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.describe()
            time.sleep(0.05)
