"""What the tests with real processes share."""

import json

import pytest

from tests.process.fleet import Fleet
from tests.process.tracked import Tracked
from tests.wandb_server import WandbServer


def pytest_collection_modifyitems(items):
    """Everything in this folder starts processes."""
    for item in items:
        if "/process/" in str(item.path):
            item.add_marker(pytest.mark.process)


class Runs:
    """Runs a script of train/ in a folder of its own."""

    def __init__(self, folder, name):
        self.folder = folder
        self.script = name

    def start(self, name, *arguments, **options):
        """Start a run and return its ranks."""
        common = ["--tracker", "none", "--output_dir", self.folder, "--run_name", name]
        return Fleet(self.folder / "output", self.script, [*common, *arguments], **options)

    def run(self, name, *arguments, **options):
        """Run to the end; fail unless the exit code is 0."""
        finished = self.start(name, *arguments, **options).wait()
        assert finished.code == 0, finished.output
        return finished

    def steps(self, name):
        """Return the steps of a run's checkpoints."""
        return sorted(int(path.name[5:]) for path in (self.folder / name / "checkpoints").glob("step_*"))

    def file(self, name, step, file="model.safetensors"):
        """Return the bytes of a file of a checkpoint."""
        return (self.folder / name / "checkpoints" / f"step_{step:08d}" / file).read_bytes()

    def metrics(self, name):
        """Return the lines of metrics.jsonl without what depends on the clock."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in line.items() if key != "time" and not key.startswith("perf/")}
            for line in lines
        ]

    def assert_same(self, one, other, step):
        """Fail unless two runs have the same weights, optimizer and metrics, to the last bit."""
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert self.file(one, step, file) == self.file(other, step, file), file
        assert self.metrics(one) == self.metrics(other)


@pytest.fixture
def classify(tmp_path):
    """A folder in which to run train/classify.py."""
    return Runs(tmp_path, "classify")


@pytest.fixture
def reconstruct(tmp_path):
    """A folder in which to run train/reconstruct.py."""
    return Runs(tmp_path, "reconstruct")


@pytest.fixture
def stateful(tmp_path):
    """A folder in which to run train/stateful_lstm.py."""
    return Runs(tmp_path, "stateful_lstm")


@pytest.fixture
def server():
    """A W&B server on the loopback."""
    server = WandbServer()
    yield server
    server.close()
    assert server.unknown == []


@pytest.fixture
def tracked(tmp_path):
    """A folder in which to run train/classify.py with W&B."""
    return Tracked(tmp_path)
