"""Runs of train/classify.py that W&B follows, and what it should have of them."""

import json

from tests.process.fleet import Fleet

SETTINGS = ["--model", "mlp", "--log_every", "1", "--eval_every", "4", "--checkpoint_every", "4"]
SETTINGS += ["--keep_checkpoints", "9", "--preflight", "off"]


class Tracked:
    """Runs train/classify.py with W&B in a folder and a home of their own."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "run"
        self.home = folder / "home"
        self.home.mkdir()

    def start(self, environment, *arguments, faults=(), tracker=("wandb",), pictures=False):
        """Start the run."""
        hidden = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(self.home), "NETRC": str(self.home / "netrc")}
        environment = {**hidden, **environment}
        return Fleet(
            self.folder / "output",
            "classify",
            self.arguments(*arguments, tracker=tracker),
            environment=environment,
            faults=list(faults),
            pictures=pictures,
        )

    def arguments(self, *arguments, tracker=("wandb",)):
        """Return the command line."""
        return ["--tracker", *tracker, "--output_dir", self.folder, "--run_name", "run", *SETTINGS, *arguments]

    def run(self, environment, *arguments, **options):
        """Run to the end; fail unless the exit code is 0."""
        finished = self.start(environment, *arguments, **options).wait()
        assert finished.code == 0, finished.output
        return finished

    def rows(self):
        """Return the metrics of each step in metrics.jsonl, without the clock's and those of the test split."""
        rows = {}
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            line = json.loads(line)
            rows.setdefault(line.pop("step"), {}).update(_plain(line))
        return {step: row for step, row in rows.items() if row}

    def identity(self):
        """Return what run.json holds."""
        return json.loads((self.path / "run.json").read_text())


def _plain(row):
    """Return the numbers of a row that a repetition gives again."""
    clocked = ("perf/", "test/", "_", "time")
    return {name: value for name, value in row.items() if not (name.startswith(clocked) or isinstance(value, dict))}


def assert_same_rows(server, tracked):
    """Fail unless the server has each row of metrics.jsonl once, in order and with the same numbers, in one run."""
    run = server.only_run()
    rows = tracked.rows()
    assert run.steps == list(rows)
    assert [_plain(row) for row in run.history] == list(rows.values())
    assert run.name == tracked.identity()["wandb_id"]
