"""What W&B gets, row by row, from runs that are killed; and runs that end well whatever W&B does."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from launch.wandb_file import read_records
from tests.cluster import network
from tests.process.fleet import Fleet
from tests.wandb_server import KEY, WandbServer
from train.engine import wandb_tracker
from train.engine.cli import parse_settings, settings_to_yaml
from train.engine.errors import UsageError
from train.engine.settings import RunSettings

SETTINGS = ["--model", "mlp", "--log_every", "1", "--eval_every", "4", "--checkpoint_every", "4"]
SETTINGS += ["--keep_checkpoints", "9", "--preflight", "off"]


@pytest.fixture
def server():
    """A W&B server on the loopback."""
    server = WandbServer()
    yield server
    server.close()
    assert server.unknown == []


class Tracked:
    """Runs train/classify.py with W&B in a folder and a home of their own."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "run"
        self.home = folder / "home"
        self.home.mkdir()

    def start(self, environment, *arguments, faults=(), tracker=("wandb",)):
        """Start the run."""
        hidden = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(self.home), "NETRC": str(self.home / "netrc")}
        common = ["--tracker", *tracker, "--output_dir", self.folder, "--run_name", "run", *SETTINGS]
        environment = {**hidden, **environment}
        return Fleet(
            self.folder / "output", "classify", [*common, *arguments], environment=environment, faults=list(faults)
        )

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


@pytest.fixture
def tracked(tmp_path):
    """A folder in which to run train/classify.py with W&B."""
    return Tracked(tmp_path)


# ---- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_run_with_exact_rows_over_three_starts_with_a_kill(tracked, server):
    """The first start is stopped by its length, the second killed between two checkpoints, the third ends."""
    online = server.environment()
    tracked.run(online, "--max_train_steps", 6)
    assert_same_rows(server, tracked)
    tracked.start(online, "--max_train_steps", 14, faults=[("die_after", 11)]).wait()
    tracked.run(online, "--max_train_steps", 14)
    assert [start["step"] for start in tracked.identity()["starts"]] == [0, 6, 8]
    assert_same_rows(server, tracked)
    row = server.only_run().history[-1]
    for name in ("train/grad_norm", "train/learning_rate", "perf/samples_per_second", "perf/memory_mb", "val/loss"):
        assert name in row, name
    assert server.only_run().settings()["start"]["step"] == 8
    assert set(tracked.identity()["result"]) >= {"test/loss"} <= set(server.only_run().summary)


def test_rows_that_a_killed_start_never_sent_are_sent_by_the_next(tracked, server):
    """The first start finds no service and is killed with its files; the second sends everything from metrics.jsonl."""
    offline = server.environment(WANDB_MODE="offline")
    tracked.start(offline, "--max_train_steps", 14, faults=[("die_after", 7)]).wait()
    for file in tracked.path.glob("wandb/*run-*/*.wandb"):
        os.truncate(file, 7)
    tracked.run(server.environment(), "--max_train_steps", 9)
    assert_same_rows(server, tracked)


def test_what_describes_a_run_arrives(tracked, server):
    mine = {"WANDB_RUN_GROUP": "my group", "WANDB_TAGS": "one,two", "WANDB_JOB_TYPE": "sweep", "WANDB_NAME": "my name"}
    mine |= {
        "WANDB_ENTITY": "team",
        "WANDB_PROJECT": "my project",
        "SLURM_JOB_ID": "4711",
        "SLURM_ARRAY_JOB_ID": "4700",
    }
    tracked.run(server.environment(**mine), "--max_train_steps", 2, "--learning_rate", 0.002)
    run = server.only_run()
    assert (run.entity, run.project, run.tags) == ("team", "my project", ["one", "two"])
    assert {name: run.fields[name] for name in ("groupName", "jobType", "displayName")} == {
        "groupName": "my group",
        "jobType": "sweep",
        "displayName": "my name",
    }
    settings, (start,) = run.settings(), tracked.identity()["starts"]
    assert (settings["learning_rate"], settings["model"]) == (0.002, "mlp")
    assert settings["start"]["scheduler"] == {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4700"}
    assert settings["start"]["commit"] == start["commit"]
    if start["commit"] is not None:
        assert start["commit"].startswith(run.fields["commit"])


def test_job_array_is_a_group(tracked, server):
    tracked.run(server.environment(SLURM_ARRAY_JOB_ID="4700"), "--max_train_steps", 2)
    run = server.only_run()
    assert [run.fields[name] for name in ("groupName", "jobType", "displayName")] == ["4700", "classify", "run"]
    assert run.project == "exact-training"


def test_pictures_arrive(tracked, server):
    tracked.run(server.environment(), "--max_train_steps", 2)
    run = server.only_run()
    assert "first_batch" in run.history[0] and "curves" in run.summary
    for picture in (run.history[0]["first_batch"], run.summary["curves"]):
        assert run.uploads[picture["path"]][:4] == b"\x89PNG"


def test_pictures_of_the_other_scripts_arrive(tracked, server, tmp_path):
    """Reconstructions with the row of their step, the answers of a stateful model at the end."""
    common = ["--tracker", "wandb", "--output_dir", tmp_path]
    reconstruct = ["--run_name", "images", "--preflight", "off", "--max_train_steps", 2, "--batch_size", 8]
    stateful = ["--run_name", "answers", "--max_train_steps", 2, "--window", 50, "--engine", "eager"]
    for script, arguments in (("reconstruct", reconstruct), ("stateful_lstm", stateful)):
        environment = server.environment(HOME=str(tracked.home))
        finished = Fleet(tmp_path / "output", script, [*common, *arguments], environment=environment).wait()
        assert finished.code == 0, finished.output
    runs = {run.fields["displayName"]: run for run in server.runs.values()}
    assert runs["images"].fields["jobType"] == "reconstruct"
    assert runs["images"].history[-1]["_step"] == 2
    for run, picture in (
        (runs["images"], runs["images"].history[-1]["reconstructions"]),
        (runs["answers"], runs["answers"].summary["answers"]),
    ):
        assert run.uploads[picture["path"]][:4] == b"\x89PNG"


@pytest.mark.slow
def test_checkpoints_become_artifacts_without_a_copy(tracked):
    """Offline; W&B's file names the checkpoints where they lie, and the home directory stays small."""
    tracked.run({"WANDB_MODE": "offline"}, "--max_train_steps", 8, "--wandb_artifact")
    (file,) = tracked.path.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(content) for content in read_records(file)]
    artifacts = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in records if record.HasField("artifact")]
    assert {alias for artifact in artifacts for alias in artifact.aliases} >= {"best", "final"}
    for artifact in artifacts:
        (weights,) = [entry for entry in artifact.manifest.contents if entry.path == "model.safetensors"]
        assert weights.local_path.startswith(str(tracked.path / "checkpoints" / "step_"))
    copies = [path for path in [*tracked.home.rglob("*"), *(tracked.path / "wandb").rglob("*")] if path.is_file()]
    assert not [path for path in copies if path.stat().st_size == Path(weights.local_path).stat().st_size]


@pytest.mark.slow
def test_no_other_host_is_contacted(tracked):
    """In a network that leads nowhere, but would count what is sent there."""
    reason = network.missing_reason()
    if reason is not None:
        pytest.skip(reason)
    script = """
        sysctl -qw net.ipv6.conf.default.disable_ipv6=1 && ip link set lo up &&
        ip link add out type veth peer name far && ip address add 10.9.9.1/24 dev out &&
        ip link set far up && ip link set out up && ip route add default dev out &&
        mount -t sysfs sysfs /sys && mount --bind "$1" /etc/resolv.conf && shift && "$@"
        echo sent $(cat /sys/class/net/out/statistics/tx_packets)
        python3 -c 'import socket; socket.getaddrinfo("example.org", 443)' 2> /dev/null
        echo sent then $(cat /sys/class/net/out/statistics/tx_packets)
    """
    names = tracked.folder / "resolv.conf"
    names.write_text("nameserver 10.9.9.9\n")
    command = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", names, sys.executable, "-m", __name__]
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    finished = subprocess.run(
        [*command, tracked.folder],
        cwd=Path(__file__).parents[2],
        env={**hidden, "HOME": str(tracked.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert "steps [1, 2, 3, 4]" in finished.stdout, finished.stdout
    assert "sent 0\n" in finished.stdout and "sent then" in finished.stdout, finished.stdout
    assert "sent then 0\n" not in finished.stdout, finished.stdout


def _train_beside_server(folder):
    """Train with a server in the same network, and print what it got."""
    server = WandbServer()
    arguments = ["--output_dir", folder, "--run_name", "run", "--max_train_steps", 4, *SETTINGS]
    finished = Fleet(Path(folder), "classify", arguments, environment=server.environment()).wait()
    print(finished.output, "steps", server.only_run().steps)


# ---- whatever W&B does -----------------------------------------------------------------------------------------------


def assert_ends_well(tracked, fleet, warnings):
    """Fail unless the run ends with a trained model, so many warnings, and soon after its last line of metrics."""
    finished = fleet.wait(180)
    ended = time.time()
    assert finished.code == 0, finished.output
    assert len([line for line in finished.output.splitlines() if "warning" in line.lower()]) == warnings, (
        finished.output
    )
    assert "Traceback" not in finished.output
    lines = [json.loads(line) for line in (tracked.path / "metrics.jsonl").read_text().splitlines()]
    assert "test/loss" in lines[-1]
    assert list(tracked.rows()) == list(range(1, 9))
    # A bound in the code is what is asserted; the rest is for a machine under load.
    assert ended - lines[-1]["time"] < wandb_tracker.FINISH_TIMEOUT_SECONDS + 35
    assert max(wandb_tracker.FINISH_TIMEOUT_SECONDS, wandb_tracker.INIT_TIMEOUT_SECONDS) <= 25
    return finished.output


def test_no_key(tracked, server):
    output = assert_ends_well(
        tracked, tracked.start({"WANDB_BASE_URL": server.url}, "--max_train_steps", 8), warnings=0
    )
    assert "W&B: offline (there is no key); upload later with: python launch/wandb_sync.py" in output
    assert server.requests == []


def test_nobody_at_a_terminal_is_asked(tracked, server):
    """There is no key, and W&B would ask for one."""
    fleet = tracked.start({"WANDB_BASE_URL": server.url}, "--max_train_steps", 8, faults=[("sit_at_terminal",)])
    output = assert_ends_well(tracked, fleet, warnings=0)
    assert "8/8" in output and "W&B: offline (there is no key)" in output


@pytest.mark.parametrize("key", ["short", KEY])
def test_bad_key(tracked, server, key):
    server.fault = "key"
    fleet = tracked.start(server.environment(WANDB_API_KEY=key, WANDB_MODE=None), "--max_train_steps", 8)
    assert "warning: W&B lets us not in (" in assert_ends_well(tracked, fleet, warnings=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gone", "silent", "error"])
def test_service_that_is_down_at_the_start(tracked, server, fault):
    server.fault = fault
    if fault == "gone":
        server.close()
    shorter = ("set_attribute", "train.engine.wandb_tracker", "INIT_TIMEOUT_SECONDS", 5)
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, faults=[shorter])
    assert "warning: W&B lets us not in (" in assert_ends_well(tracked, fleet, warnings=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "error"])
def test_artifact_that_is_not_taken(tracked, server, fault):
    """The service went down in the middle, and W&B asks it for a while before it takes an artifact."""
    server.die_at, server.die_of = "ArtifactType", fault
    names = ("FINISH_TIMEOUT_SECONDS", "ARTIFACT_SECONDS")
    faults = [("set_attribute", "train.engine.wandb_tracker", name, 3) for name in names]
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, "--wandb_artifact", faults=faults)
    assert "warning: wandb failed (an artifact was not" in assert_ends_well(tracked, fleet, warnings=1)
    assert wandb_tracker.FINISH_TIMEOUT_SECONDS + wandb_tracker.ARTIFACT_SECONDS <= 30


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gone", "silent", "error"])
def test_service_that_goes_down_in_the_middle(tracked, server, fault):
    """What it did not get, all rows, is sent by a later start."""
    server.die_after, server.die_of = 0, fault
    shorter = ("set_attribute", "train.engine.wandb_tracker", "FINISH_TIMEOUT_SECONDS", 5)
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, faults=[shorter])
    assert "warning: wandb failed (Timed out finishing run.)" in assert_ends_well(tracked, fleet, warnings=1)
    assert server.only_run().steps == []
    if fault != "gone":
        server.fault = None
        tracked.run(server.environment(), "--max_train_steps", 10)
        assert_same_rows(server, tracked)


def test_failure_of_the_run_itself_is_not_held_up(tracked, server):
    server.die_after, server.die_of = 0, "silent"
    faults = [
        ("poison_loss", 5, "nan", 1),
        ("set_attribute", "train.engine.wandb_tracker", "FINISH_TIMEOUT_SECONDS", 5),
    ]
    started = time.monotonic()
    finished = tracked.start(server.environment(), "--max_train_steps", 8, faults=faults).wait()
    assert finished.code == 1 and "NaN" in finished.output and "Traceback" not in finished.output, finished.output
    assert time.monotonic() - started < 60


def test_killed_wandb(tracked, server):
    fleet = tracked.start(server.environment(), "--max_train_steps", 8, faults=[("kill_wandb", 3)])
    assert "warning: wandb failed" in assert_ends_well(tracked, fleet, warnings=1)


def test_home_that_cannot_be_written(tracked, server):
    fleet = tracked.start(server.environment(HOME="/proc"), "--max_train_steps", 8)
    assert_ends_well(tracked, fleet, warnings=0)
    assert_same_rows(server, tracked)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_full_disk(tracked, server, mode):
    """A small file system in the place of W&B's files."""
    folder = tracked.path / "wandb"
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("a file system has to be mounted by root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this kernel or container mounts nothing: {mounted.stderr}")
    try:
        fleet = tracked.start(server.environment(WANDB_MODE=mode), "--max_train_steps", 8)
        assert_ends_well(tracked, fleet, warnings=1)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# ---- TensorBoard, and several at once --------------------------------------------------------------------------------


def test_tensorboard_shows_each_step_once_after_a_kill(tracked, server):
    """Beside W&B; the killed start wrote steps that the next one repeats."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both = {"tracker": ("wandb", "tensorboard")}
    tracked.start(server.environment(), "--max_train_steps", 10, faults=[("die_after", 7)], **both).wait()
    tracked.run(server.environment(), "--max_train_steps", 10, **both)
    shown = EventAccumulator(str(tracked.path / "tensorboard"))
    shown.Reload()
    points = shown.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 11))
    losses = [row["train/loss"] for row in tracked.rows().values()]
    assert [point.value for point in points] == pytest.approx(losses)
    assert shown.Scalars("test/loss")[0].step == 10
    assert_same_rows(server, tracked)


def test_missing_tensorboard_is_refused_before_anything_is_written(tracked):
    fleet = tracked.start({}, tracker=("tensorboard",), faults=[("hide_package", "tensorboard")])
    finished = fleet.wait()
    assert finished.code == 2, finished.output
    assert "error: --tracker" in finished.output and "pip install tensorboard" in finished.output
    assert not tracked.path.exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [("none", ("none",)), ("wandb", ("wandb",)), ("[wandb, tensorboard]", ("wandb", "tensorboard"))],
)
def test_recipes_name_one_tracker_or_several(tmp_path, monkeypatch, line, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if all packages were there
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"tracker: {line}\n")
    settings = parse_settings(RunSettings, ["--config", str(recipe)], "")
    assert settings.tracker == expected
    recipe.write_text(settings_to_yaml(settings))
    assert parse_settings(RunSettings, ["--config", str(recipe)], "") == settings


def test_none_stands_alone():
    with pytest.raises(UsageError, match="none alone"):
        parse_settings(RunSettings, ["--tracker", "none", "wandb"], "")


if __name__ == "__main__":
    _train_beside_server(sys.argv[1])
